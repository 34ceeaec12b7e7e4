"""Build the model: tiny with random weights, or from a LLaVA, a saved UMBRELLA model or a partial checkpoint."""

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
from umbrella.models.partial_checkpoint import check_base, is_partial, load_saved_weights, read_base
from umbrella.models.settings import ModelSettings
from umbrella.models.umbrella_llava import ADAPTER, UmbrellaConfig, UmbrellaForConditionalGeneration
from umbrella.models.volume_embedder import ModalityEmbedder, inflate
from umbrella.version import check_version

SUPPORTED_MODELS = ("llava", "llava_next", "llava_onevision", UmbrellaConfig.model_type)
"""Supported model types. All have a vision tower, a projector of two layers and a language model."""
SUPPORTED_TOWERS = ("siglip_vision_model", "clip_vision_model")
SUPPORTED_LANGUAGE_MODELS = ("qwen2", "llama")
COPIED_SETTINGS = (
    "image_token_index",
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "multimodal_projector_bias",
    "tie_word_embeddings",
)
"""Settings that are copied from the configuration of a plain LLaVA."""


def check_checkpoint(settings: ModelSettings, modalities: Mapping[str, Modality]) -> PretrainedConfig:
    """Check that a model for these modalities can be built from ``settings.checkpoint``, without loading weights.

    Returns:
        The configuration of the checkpoint.

    Raises:
        UserError: if the checkpoint cannot be read, is not a supported LLaVA, does not fit the modalities, was written
            by a version of UMBRELLA that is too old, or is partial and its base is missing or has changed.
    """
    where = f"model.checkpoint={settings.checkpoint}"
    try:
        config = AutoConfig.from_pretrained(settings.checkpoint, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be loaded: {describe_load_error(error)}") from None
    if config.model_type not in SUPPORTED_MODELS:
        raise UserError(f"{where}: is a {config.model_type}; {', '.join(SUPPORTED_MODELS)} work")
    tower, language = config.vision_config.model_type, config.text_config.model_type
    if tower not in SUPPORTED_TOWERS:
        raise UserError(f"{where}: its tower is {tower}; {' and '.join(SUPPORTED_TOWERS)} work")
    if language not in SUPPORTED_LANGUAGE_MODELS:
        raise UserError(f"{where}: its language model is {language}; {' and '.join(SUPPORTED_LANGUAGE_MODELS)} work")
    if isinstance(config, UmbrellaConfig):
        check_version(settings.checkpoint)
        known = config.modalities
        for name, modality in modalities.items():
            if name in known and known[name].patch != modality.patch:
                theirs, ours = ("x".join(map(str, m.patch)) for m in (known[name], modality))
                raise UserError(
                    f"{where}: reads {name} in patches of {theirs}, and modalities.{name}.patch is {ours}; take the"
                    " same, or give the modality another name"
                )
            if name not in known and settings.embedder_init == "inflated":
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
    """Load ``settings.checkpoint`` with an embedder for each modality, and the id of the placeholder token.

    With the meta device as the default one, weights are neither read nor allocated.

    Raises:
        UserError: see ``check_checkpoint``; also if weights are missing, truncated, or not in safetensors format.
    """
    config = check_checkpoint(settings, modalities)
    is_umbrella = isinstance(config, UmbrellaConfig)
    if torch.get_default_device().type == "meta":  # to count parameters and memory
        new: Any = UmbrellaForConditionalGeneration if is_umbrella else AutoModelForImageTextToText.from_config
        model = new(config)
    elif is_partial(settings.checkpoint):
        model = _load_partial(settings, config)
    else:
        model = _load_full(settings, is_umbrella)
    if is_umbrella:
        # Keep the embedders of these modalities, interpolated to their grids, and add missing ones.
        known, width = model.embedder.by_modality, model.config.vision_config.hidden_size
        embedders: dict[str, Any] = {}
        for name, modality in modalities.items():
            embedders[name] = known[name] if name in known else ModalityEmbedder(modality, width)
            embedders[name].fit_grid(modality.patch_grid)
        model.embedder.by_modality = nn.ModuleDict(embedders)
    else:
        model = from_llava(model, modalities, settings.embedder_init)
    model.config.umbrella_modalities = _modality_configs(modalities)
    model.config.image_token_index = image_id
    return model


def _load_full(settings: ModelSettings, is_umbrella: bool) -> Any:
    where = f"model.checkpoint={settings.checkpoint}"
    model_class: Any = UmbrellaForConditionalGeneration if is_umbrella else AutoModelForImageTextToText
    try:
        model, report = model_class.from_pretrained(
            settings.checkpoint,
            # Trained weights are float32. ``cast_frozen`` casts the others later.
            dtype=torch.float32 if is_umbrella or settings.dtype == "float32" else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{where}: cannot be loaded: {describe_load_error(error)}") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{where}: lacks {len(missing)} weights, {missing[0]} among them; is the download complete?")
    return model


def _load_partial(settings: ModelSettings, config: UmbrellaConfig) -> UmbrellaForConditionalGeneration:
    """Load the base of a partial checkpoint, then the trained weights."""
    folder = Path(settings.checkpoint)
    base = settings.model_copy(update={"checkpoint": read_base(folder)["checkpoint"], "embedder_init": "random"})
    try:
        model = load_model(base, config.modalities, config.image_token_index)
    except UserError as error:
        raise UserError(f"{folder}: was trained on {base.checkpoint}: {error}") from None
    check_base(folder)  # again: all files are downloaded now
    if (folder / ADAPTER).is_dir() and not model.has_adapters:
        model.load_adapter(str(folder / ADAPTER))
    try:
        load_saved_weights(folder, model)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded: {describe_load_error(error)}") from None
    return model


def _modality_configs(modalities: Mapping[str, Modality]) -> dict[str, Any]:
    return {name: modality.model_dump(mode="json") for name, modality in modalities.items()}


@torch.no_grad()
def from_llava(
    llava: Any, modalities: Mapping[str, Modality], init: str = "random"
) -> UmbrellaForConditionalGeneration:
    """Replace the 2D embeddings of a plain LLaVA by volume embedders. All other modules are shared, not copied.

    The embedders are float32. If the other weights have half precision, run the model under autocast. ``init`` is
    "random" or "inflated".
    """
    config = UmbrellaConfig(
        **{name: getattr(llava.config, name) for name in COPIED_SETTINGS if hasattr(llava.config, name)},
        # The configurations of the components contain their attention implementation.
        vision_config=llava.config.vision_config,
        text_config=llava.config.text_config,
        umbrella_modalities=_modality_configs(modalities),
    )
    if config.vision_config.model_type == "siglip_vision_model":
        config.vision_feature_select_strategy = "full"  # "default" drops the class token, which SigLIP lacks
    embeddings_2d = llava.model.vision_tower.embeddings
    with torch.device("meta"):  # all weights except the embedder's are replaced below
        model = UmbrellaForConditionalGeneration(config)
    embedder = model.embedder.to_empty(device=embeddings_2d.position_embedding.weight.device)
    for modality in embedder.by_modality.values():
        assert isinstance(modality, ModalityEmbedder)
        modality.reset_parameters()
    if embedder.class_embedding is not None:
        class_position = embeddings_2d.position_embedding.weight[0].float()
        embedder.class_embedding.copy_(embeddings_2d.class_embedding.float() + class_position)
    if init == "inflated":
        inflate(embedder, embeddings_2d)
    llava.model.vision_tower.embeddings = embedder
    for component in ("vision_tower", "multi_modal_projector", "language_model"):
        setattr(model.model, component, getattr(llava.model, component))
    model.lm_head, model.generation_config = llava.lm_head, llava.generation_config
    return model.train(llava.training)


def build_model(
    settings: ModelSettings, modalities: Mapping[str, Modality], vocabulary: int, image_id: int
) -> UmbrellaForConditionalGeneration:
    """Build the model of the settings. Parameters outside ``settings.train`` are frozen.

    Args:
        settings: settings of the model.
        modalities: each gets an embedder.
        vocabulary: size of the vocabulary, for the tiny model.
        image_id: id of the placeholder token.

    Raises:
        UserError: see ``load_model``.
    """
    if settings.checkpoint:
        model = load_model(settings, modalities, image_id)
    else:
        layer = {
            "hidden_size": settings.width,
            "intermediate_size": 4 * settings.width,
            "num_attention_heads": settings.heads,
        }
        config = UmbrellaConfig(
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
            umbrella_modalities=_modality_configs(modalities),
        )
        model = UmbrellaForConditionalGeneration(config)
    model.use_attention(settings.attention)
    # Greedy decoding: the generation settings of a checkpoint may include sampling, beams or repetition penalties.
    loaded = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=loaded.bos_token_id, eos_token_id=loaded.eos_token_id, pad_token_id=loaded.pad_token_id
    )
    if "lora" in settings.train.split("+"):
        add_lora(model, settings)
    select_trainable(model, settings.train)
    cast_frozen(model, getattr(torch, settings.dtype))
    return model


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen matrices to ``dtype`` and all other parameters to float32. In place; tied weights stay tied.

    Run such a model under autocast. Frozen norms and biases stay in float32: they are small, and norms on a CPU need
    float32 parameters.
    """
    for weight in model.parameters():
        is_frozen_matrix = weight.ndim > 1 and not weight.requires_grad
        weight.data = weight.data.to(dtype if is_frozen_matrix else torch.float32)


LORA_TARGETS = r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Regular expression for all linear layers in the decoder layers of Qwen2 and Llama."""


def component_parameters(model: UmbrellaForConditionalGeneration) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each component: embedder, tower, projector, lora, language_model.

    Each parameter belongs to exactly one component. Components without parameters are omitted.
    """
    candidates = {
        "embedder": model.embedder.parameters(),
        "tower": model.model.vision_tower.parameters(),
        "projector": model.model.multi_modal_projector.parameters(),
        "lora": (weight for name, weight in model.named_parameters() if ".lora_" in name),
        "language_model": model.parameters(),
    }
    result: dict[str, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for name, weights in candidates.items():
        result[name] = [weight for weight in weights if weight not in seen]
        seen.update(result[name])
    return {name: weights for name, weights in result.items() if weights}


def add_lora(model: UmbrellaForConditionalGeneration, settings: ModelSettings) -> None:
    """Add LoRA adapters (Hu et al. 2021) to the language model, unless the checkpoint has adapters.

    Raises:
        UserError: if the adapters of the checkpoint differ from the settings.
    """
    from peft import LoraConfig  # this import takes seconds

    wanted = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    if not model.has_adapters:
        model.add_adapter(LoraConfig(**wanted, target_modules=LORA_TARGETS))
        return
    (config,) = model.peft_config.values()
    existing = {name: getattr(config, name) for name in wanted}
    if existing != wanted:
        has = ", ".join(f"{name}={value:g}" for name, value in existing.items())
        raise UserError(
            f"model.checkpoint={settings.checkpoint}: has adapters already, made with {has}; set model.lora_rank,"
            " .lora_alpha and .lora_dropout to that"
        )


def merge_adapters(model: UmbrellaForConditionalGeneration) -> None:
    """Add the LoRA adapters of a model to the weights that they adapt, and remove them. In place; dtypes stay."""
    if not model.has_adapters:
        return
    from peft.tuners.lora import LoraLayer

    for name, layer in [pair for pair in model.named_modules() if isinstance(pair[1], LoraLayer)]:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    for name in list(model.peft_config):
        model.delete_adapter(name)


def select_trainable(model: UmbrellaForConditionalGeneration, train: str) -> None:
    """Set ``requires_grad`` of all parameters. In place.

    ``train`` is "all", or trainable components joined by +, as in "embedder+lora". The others are frozen.
    """
    for name, weights in component_parameters(model).items():
        for weight in weights:
            weight.requires_grad_(train == "all" or name in train.split("+"))
    # Layers after the last feature layer, the final norm and the head of SigLIP get no gradient.
    tower = model.model.vision_tower
    unused = [*tower.encoder.layers[max(model.feature_layers) :], tower.post_layernorm, getattr(tower, "head", None)]
    for module in filter(None, unused):
        module.requires_grad_(False)
