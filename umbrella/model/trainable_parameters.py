"""Which weights move: the model's parts by name, and adapters for the language model."""

from torch import nn

from umbrella.base import UserError
from umbrella.model.settings import ModelSettings
from umbrella.model.umbrella_llava import UmbrellaForConditionalGeneration

LORA_TARGETS = r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Every matrix of the language model's layers, by Qwen2's and Llama's names."""


def component_parameters(model: UmbrellaForConditionalGeneration) -> dict[str, list[nn.Parameter]]:
    """The model's weights by part, each weight in one: embedder, tower, projector, lora (if any), language_model."""
    named = {
        "embedder": model.embedder.named_parameters(),
        "tower": model.model.vision_tower.named_parameters(),
        "projector": model.model.multi_modal_projector.named_parameters(),
        "lora": ((name, weight) for name, weight in model.named_parameters() if ".lora_" in name),
        "language_model": model.named_parameters(),
    }
    seen: set[nn.Parameter] = set()
    result: dict[str, list[nn.Parameter]] = {}
    for name, weights in named.items():
        result[name] = [weight for _, weight in weights if weight not in seen]
        seen.update(result[name])
    return {name: weights for name, weights in result.items() if weights}


def add_lora(model: UmbrellaForConditionalGeneration, settings: ModelSettings) -> None:
    """Adapters (LoRA, Hu et al. 2021) on the language model, unless a checkpoint has brought its own.

    Raises:
        UserError: those that it brought are made otherwise than the settings say.
    """
    from peft import LoraConfig  # seconds, which trainings without adapters need not spend

    asked = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    if not model.has_adapters:
        model.add_adapter(LoraConfig(**asked, target_modules=LORA_TARGETS))
        return
    (own,) = model.peft_config.values()
    there = {name: getattr(own, name) for name in asked}
    if there != asked:
        has = ", ".join(f"{name}={value:g}" for name, value in there.items())
        raise UserError(
            f"model.checkpoint={settings.checkpoint}: has adapters already, made with {has}; set model.lora_rank,"
            " .lora_alpha and .lora_dropout to that"
        )


def select_trainable(model: UmbrellaForConditionalGeneration, what: str) -> None:
    """Freeze every part that ``what`` does not name: "all", or parts joined by +, as in "embedder+lora".

    Raises:
        ValueError: a part of that name does not exist.
    """
    names = list(component_parameters(model)) if what == "all" else what.split("+")
    for name in names:
        if name not in component_parameters(model):
            raise ValueError(f"{name} is not a part of the model")
    for name, weights in component_parameters(model).items():
        for weight in weights:
            weight.requires_grad_(name in names)
    # The features are the output of a layer: the layers behind it, the last norm and SigLIP's head have no gradient.
    tower = model.model.vision_tower
    unused = [*tower.encoder.layers[max(model.feature_layers) :], tower.post_layernorm, getattr(tower, "head", None)]
    for module in unused:
        if module is not None:
            module.requires_grad_(False)
