"""Where a model comes from: made tiny in code, from a plain LLaVA checkpoint, or from a saved model of ours."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import (
    AutoConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from umbrella.base import UserError
from umbrella.modality import Modality
from umbrella.model.embedder import ModalityEmbedder
from umbrella.model.inflation import inflate
from umbrella.model.selection import add_lora, select_trainable
from umbrella.model.settings import ModelSettings
from umbrella.model.umbrella_llava import UmbrellaConfig, UmbrellaForConditionalGeneration

TOWERS = ("siglip_vision_model", "clip_vision_model")
LANGUAGE_MODELS = ("qwen2", "llama")


def build_model(
    settings: ModelSettings, modalities: Mapping[str, Modality], vocabulary: int, image_id: int
) -> UmbrellaForConditionalGeneration:
    """A model whose volume embedder fits ``modalities``, with ``settings.train`` saying which weights move.

    Args:
        vocabulary: words that the tokenizer knows; the tiny model gets as many.
        image_id: the placeholder's token id.

    Raises:
        UserError: a checkpoint that cannot be loaded, that is no LLaVA of a known kind, or that does not fit.
    """
    kinds = {name: modality.model_dump(mode="json") for name, modality in modalities.items()}
    if settings.checkpoint:
        model = _from_checkpoint(settings, modalities, kinds, image_id)
    else:
        model = UmbrellaForConditionalGeneration(_tiny_config(settings, kinds, vocabulary, image_id))
    # A checkpoint's own generation settings may draw words at random.
    model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    if "lora" in settings.train.split("+"):
        add_lora(model, settings)
    select_trainable(model, settings.train)
    return model


def _tiny_config(settings: ModelSettings, kinds: dict, vocabulary: int, image_id: int) -> UmbrellaConfig:
    layer = {
        "hidden_size": settings.width,
        "intermediate_size": 4 * settings.width,
        "num_attention_heads": settings.heads,
    }
    return UmbrellaConfig(
        vision_config=SiglipVisionConfig(**layer, num_hidden_layers=settings.tower_layers, vision_use_head=False),
        text_config=Qwen2Config(
            **layer,
            num_hidden_layers=settings.language_layers,
            num_key_value_heads=settings.heads,
            vocab_size=vocabulary,
            tie_word_embeddings=True,
        ),
        image_token_index=image_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        umbrella_modalities=kinds,
    )


def check_checkpoint(settings: ModelSettings, modalities: Mapping[str, Modality]) -> PretrainedConfig:
    """The configuration of ``settings.checkpoint``, if a model for these modalities can be made of it.

    Raises:
        UserError: it cannot be read, is no LLaVA of a known kind, or does not fit the modalities.
    """
    where = f"model.checkpoint={settings.checkpoint}"
    try:
        config = AutoConfig.from_pretrained(settings.checkpoint)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(config, LlavaConfig):
        raise UserError(f"{where}: is a {config.model_type}, not a LLaVA")
    tower, language = config.vision_config.model_type, config.text_config.model_type
    if tower not in TOWERS:
        raise UserError(f"{where}: its tower is {tower}; {' and '.join(TOWERS)} work")
    if language not in LANGUAGE_MODELS:
        raise UserError(f"{where}: its language model is {language}; {' and '.join(LANGUAGE_MODELS)} work")
    if isinstance(config, UmbrellaConfig):
        own = config.modalities
        for name, modality in modalities.items():
            if name in own and own[name].patch != modality.patch:
                raise UserError(
                    f"{where}: reads {name} in patches of {_by(own[name].patch)}, and modalities.{name}.patch is"
                    f" {_by(modality.patch)}; take the same, or give the modality another name"
                )
            if name not in own and settings.embedder_init == "inflated":
                raise UserError(
                    f"{where}: has no embedder for {name}, and no 2D weights to inflate one from; take"
                    " model.embedder_init=random"
                )
    return config


def _from_checkpoint(
    settings: ModelSettings, modalities: Mapping[str, Modality], kinds: dict, image_id: int
) -> UmbrellaForConditionalGeneration:
    where = f"model.checkpoint={settings.checkpoint}"
    ours = isinstance(check_checkpoint(settings, modalities), UmbrellaConfig)
    try:
        model, report = (UmbrellaForConditionalGeneration if ours else LlavaForConditionalGeneration).from_pretrained(
            settings.checkpoint,
            dtype=torch.float32,
            attn_implementation={"text_config": settings.attention},
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{where}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{where}: lacks {len(missing)} weights, {missing[0]} among them; is the download whole?")
    if ours:
        _fit(model, modalities)
    else:
        model = from_llava(model, kinds, settings.embedder_init)
    model.config.umbrella_modalities = kinds
    model.config.image_token_index = image_id
    return model


@torch.no_grad()
def from_llava(
    llava: LlavaForConditionalGeneration, kinds: dict, init: str = "random"
) -> UmbrellaForConditionalGeneration:
    """A plain LLaVA with volume embedders, random or inflated, in place of its 2D one; all else is taken over."""
    config = UmbrellaConfig(
        **{**llava.config.to_dict(), "model_type": UmbrellaConfig.model_type, "umbrella_modalities": kinds}
    )
    # The parts keep their configurations, which say how each attends.
    config.vision_config, config.text_config = llava.config.vision_config, llava.config.text_config
    if config.vision_config.model_type == "siglip_vision_model":
        config.vision_feature_select_strategy = "full"  # "default" drops a class token, and SigLIP has none
    flat = llava.model.vision_tower.embeddings
    with torch.device("meta"):  # every weight but the embedder's is taken over
        model = UmbrellaForConditionalGeneration(config)
    embedder = model.embedder.to_empty(device=flat.position_embedding.weight.device)
    for modality in embedder.by_modality.values():
        assert isinstance(modality, ModalityEmbedder)
        modality.reset_parameters()
    if embedder.class_embedding is not None:
        embedder.class_embedding.copy_(flat.class_embedding + flat.position_embedding.weight[0])
    if init == "inflated":
        inflate(embedder, flat)
    llava.model.vision_tower.embeddings = embedder
    llava.model.config = config
    model.model, model.lm_head, model.generation_config = llava.model, llava.lm_head, llava.generation_config
    return model.train(llava.training)


def _fit(model: UmbrellaForConditionalGeneration, modalities: Mapping[str, Modality]) -> None:
    """Give a saved model embedders for these modalities: its own, on another grid if need be, and new ones."""
    known, width = model.embedder.by_modality, model.config.vision_config.hidden_size
    embedders = {}
    for name, modality in modalities.items():
        embedder = known[name] if name in known else ModalityEmbedder(modality, width)
        assert isinstance(embedder, ModalityEmbedder)
        embedder.fit_grid(modality.patch_grid)
        embedders[name] = embedder
    model.embedder.by_modality = nn.ModuleDict(embedders)


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
