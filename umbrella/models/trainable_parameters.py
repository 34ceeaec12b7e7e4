"""Selection of trainable parameters by component, and LoRA adapters."""

from torch import nn

from umbrella.base import UserError
from umbrella.models.settings import ModelSettings
from umbrella.models.umbrella_llava import UmbrellaForConditionalGeneration

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
