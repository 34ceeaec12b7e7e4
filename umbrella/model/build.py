"""A checkpoint to a model: a plain LLaVA, whose parts are taken over, a saved model of ours, or what was trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from umbrella.base import UserError, describe_load_error
from umbrella.modality import Modality
from umbrella.model.inflation import inflate
from umbrella.model.partial_checkpoint import base_checkpoint, check_base, is_partial, load_saved_weights
from umbrella.model.settings import ModelSettings
from umbrella.model.trainable_parameters import add_lora, select_trainable
from umbrella.model.umbrella_llava import ADAPTER, UmbrellaConfig, UmbrellaForConditionalGeneration
from umbrella.model.volume_embedder import ModalityEmbedder
from umbrella.version import check_version

FAMILY = ("llava", "llava_next", "llava_onevision", UmbrellaConfig.model_type)
"""Kinds of checkpoints with a tower, a projector of two layers and a language model, which can be taken over."""
TOWERS = ("siglip_vision_model", "clip_vision_model")
LANGUAGE_MODELS = ("qwen2", "llama")
TAKEN_OVER = (
    "image_token_index",
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "multimodal_projector_bias",
    "tie_word_embeddings",
)
"""What of a plain LLaVA's configuration is ours too."""


def check_checkpoint(settings: ModelSettings, modalities: Mapping[str, Modality]) -> PretrainedConfig:
    """The configuration of ``settings.checkpoint``, if a model for these modalities can be made of it.

    Raises:
        UserError: it cannot be read, is no LLaVA of a known kind, or does not fit the modalities; a version
            of UMBRELLA that is too old wrote it; it holds what was trained on a base that is gone or changed.
    """
    where = f"model.checkpoint={settings.checkpoint}"
    try:
        config = AutoConfig.from_pretrained(settings.checkpoint, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be loaded: {describe_load_error(error)}") from None
    if config.model_type not in FAMILY:
        raise UserError(f"{where}: is a {config.model_type}; {', '.join(FAMILY)} work")
    tower, language = config.vision_config.model_type, config.text_config.model_type
    if tower not in TOWERS:
        raise UserError(f"{where}: its tower is {tower}; {' and '.join(TOWERS)} work")
    if language not in LANGUAGE_MODELS:
        raise UserError(f"{where}: its language model is {language}; {' and '.join(LANGUAGE_MODELS)} work")
    if isinstance(config, UmbrellaConfig):
        check_version(settings.checkpoint)
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
    if is_partial(settings.checkpoint):
        check_base(settings.checkpoint)
    return config


def load_model(
    settings: ModelSettings, modalities: Mapping[str, Modality], image_id: int
) -> UmbrellaForConditionalGeneration:
    """The model of ``settings.checkpoint``, in float32, with an embedder for each of these modalities.

    Raises:
        UserError: see ``check_checkpoint``; weights that are missing, cut short, or not safetensors.
    """
    where = f"model.checkpoint={settings.checkpoint}"
    config = check_checkpoint(settings, modalities)
    words = config.text_config.vocab_size
    if image_id >= words:
        raise UserError(f"{where}: its tokenizer's placeholder is token {image_id}, and its model knows {words} words")
    ours = isinstance(config, UmbrellaConfig)
    model = _laid_over_base(settings, config) if is_partial(settings.checkpoint) else _from_files(settings, ours)
    kinds = {name: modality.model_dump(mode="json") for name, modality in modalities.items()}
    if ours:
        _fit(model, modalities)
    else:
        model = from_llava(model, kinds, settings.embedder_init)
    model.config.umbrella_modalities = kinds
    model.config.image_token_index = image_id
    return model


def load_trained(folder: str | Path) -> UmbrellaForConditionalGeneration:
    """The model of a training's checkpoint, whole or not, in float32; its ``save_pretrained`` writes all of it.

    Raises:
        UserError: see ``load_model``.
    """
    config = UmbrellaConfig.from_pretrained(folder, trust_remote_code=False)
    return load_model(ModelSettings(checkpoint=str(folder)), config.modalities, config.image_token_index).eval()


def _from_files(settings: ModelSettings, ours: bool) -> Any:
    """What transformers makes of a checkpoint that holds all weights."""
    where = f"model.checkpoint={settings.checkpoint}"
    try:
        model, report = (UmbrellaForConditionalGeneration if ours else AutoModelForImageTextToText).from_pretrained(
            settings.checkpoint,
            # What a run of ours trained is float32, and stays so; others are cast below, part by part.
            dtype=torch.float32 if ours or settings.dtype == "float32" else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{where}: cannot be loaded: {describe_load_error(error)}") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{where}: lacks {len(missing)} weights, {missing[0]} among them; is the download whole?")
    return model


def _laid_over_base(settings: ModelSettings, config: UmbrellaConfig) -> UmbrellaForConditionalGeneration:
    """The model of a training's base, with what was trained in its place."""
    folder = Path(settings.checkpoint)
    base = settings.model_copy(update={"checkpoint": base_checkpoint(settings.checkpoint), "embedder_init": "random"})
    try:
        model = load_model(base, config.modalities, config.image_token_index)
    except UserError as error:
        raise UserError(f"{folder}: holds what was trained on {base.checkpoint}: {error}") from None
    check_base(folder)  # now that all of it is here
    if (folder / ADAPTER).is_dir() and not model.has_adapters:
        model.load_adapter(str(folder / ADAPTER))
    try:
        load_saved_weights(folder, model)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded: {describe_load_error(error)}") from None
    return model


@torch.no_grad()
def from_llava(llava: Any, kinds: dict, init: str = "random") -> UmbrellaForConditionalGeneration:
    """A plain LLaVA with volume embedders, random or inflated, in place of its 2D one; all else is taken over.

    The embedders are float32, whatever the rest is: with a rest in half precision, run it under autocast.
    """
    config = UmbrellaConfig(
        **{name: getattr(llava.config, name) for name in TAKEN_OVER if hasattr(llava.config, name)},
        # The parts keep their configurations, which say how each attends.
        vision_config=llava.config.vision_config,
        text_config=llava.config.text_config,
        umbrella_modalities=kinds,
    )
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
        embedder.class_embedding.copy_(flat.class_embedding.float() + flat.position_embedding.weight[0].float())
    if init == "inflated":
        inflate(embedder, flat)
    llava.model.vision_tower.embeddings = embedder
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        setattr(model.model, part, getattr(llava.model, part))
    model.lm_head, model.generation_config = llava.lm_head, llava.generation_config
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
        model = load_model(settings, modalities, image_id)
    else:
        model = UmbrellaForConditionalGeneration(_tiny_config(settings, kinds, vocabulary, image_id))
    model.set_attn_implementation({"text_config": settings.attention})
    # Greedy: a checkpoint's own way of generating may draw words, search, or punish repetition.
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    if "lora" in settings.train.split("+"):
        add_lora(model, settings)
    select_trainable(model, settings.train)
    cast_frozen(model, getattr(torch, settings.dtype))
    return model


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the matrices that do not move in ``dtype``, and all other weights in float32. In place; ties stay ties.

    Such a model of two dtypes runs under autocast, as training and evaluation do. Frozen norms and biases take no room
    worth saving, and a norm on a CPU wants its own in float32.
    """
    for weight in model.parameters():
        frozen_matrix = weight.ndim > 1 and not weight.requires_grad
        weight.data = weight.data.to(dtype if frozen_matrix else torch.float32)


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
