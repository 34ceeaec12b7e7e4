"""Where a model comes from: made tiny in code, or loaded from a LLaVA checkpoint."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import AutoConfig, LlavaConfig, Qwen2Config, SiglipVisionConfig

from umbrella.base import UserError
from umbrella.modality import Modality
from umbrella.model.settings import ModelSettings
from umbrella.model.umbrella_llava import UmbrellaConfig, UmbrellaForConditionalGeneration


def build_model(
    settings: ModelSettings, modalities: Mapping[str, Modality], vocabulary: int, image_id: int
) -> UmbrellaForConditionalGeneration:
    """A model whose volume embedder fits ``modalities``, with ``settings.train`` saying which weights move.

    Args:
        vocabulary: words that the tokenizer knows; the tiny model gets as many.
        image_id: the placeholder's token id.

    Raises:
        UserError: a checkpoint that cannot be loaded, or is no LLaVA with a SigLIP tower.
    """
    kinds = {name: modality.model_dump(mode="json") for name, modality in modalities.items()}
    if settings.checkpoint:
        model = _from_checkpoint(settings.checkpoint, kinds, image_id)
    else:
        model = UmbrellaForConditionalGeneration(_tiny_config(settings, kinds, vocabulary, image_id))
    select_trainable(model, settings.train)
    return model


def parts(model: UmbrellaForConditionalGeneration) -> dict[str, list[nn.Parameter]]:
    """The model's weights by part, each weight in one: embedder, tower, projector, language_model."""
    named = {
        "embedder": model.embedder,
        "tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language_model": model,
    }
    seen: set[nn.Parameter] = set()
    result: dict[str, list[nn.Parameter]] = {}
    for name, module in named.items():
        result[name] = [p for p in module.parameters() if p not in seen]
        seen.update(result[name])
    return result


def select_trainable(model: UmbrellaForConditionalGeneration, what: str) -> None:
    """Freeze every part that ``what`` does not name: "embedder", "embedder+projector" or "all".

    Raises:
        ValueError: a part of that name does not exist.
    """
    names = list(parts(model)) if what == "all" else what.split("+")
    for name in names:
        if name not in parts(model):
            raise ValueError(f"{name} is not a part of the model")
    for name, weights in parts(model).items():
        for weight in weights:
            weight.requires_grad_(name in names)
    # The features are the output of a layer: the layers behind it and the last norm never have a gradient.
    tower, read = model.model.vision_tower, model.config.vision_feature_layer
    deepest = max(layer % (len(tower.encoder.layers) + 1) for layer in ([read] if isinstance(read, int) else read))
    for unused in (*tower.encoder.layers[deepest:], tower.post_layernorm):
        unused.requires_grad_(False)


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


def _from_checkpoint(checkpoint: str, kinds: dict, image_id: int) -> UmbrellaForConditionalGeneration:
    try:
        llava = AutoConfig.from_pretrained(checkpoint)
        if not isinstance(llava, LlavaConfig):
            raise UserError(f"model.checkpoint={checkpoint}: is a {llava.model_type}, not a LLaVA")
        if llava.vision_config.model_type != "siglip_vision_model":
            raise UserError(
                f"model.checkpoint={checkpoint}: its tower is {llava.vision_config.model_type};"
                " siglip_vision_model works"
            )
        own = {
            "model_type": UmbrellaConfig.model_type,
            "umbrella_modalities": kinds,
            "image_token_index": image_id,
            "vision_feature_select_strategy": "full",  # "default" drops a class token, and SigLIP has none
        }
        config = UmbrellaConfig(**{**llava.to_dict(), **own})
        model, report = UmbrellaForConditionalGeneration.from_pretrained(
            checkpoint, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.checkpoint={checkpoint}: cannot be loaded: {reason}") from None
    if report["mismatched_keys"]:
        wrong = "; ".join(
            f"{key} is {tuple(has)} there and {tuple(needs)} here" for key, has, needs in report["mismatched_keys"]
        )
        raise UserError(f"model.checkpoint={checkpoint}: does not fit these modalities: {wrong}")
    # A plain LLaVA has no volume embedder to load, and a checkpoint of ours none for a modality that is new to it.
    missing = report["missing_keys"]
    model.embedder.reset_parameters([n for n in kinds if any(f".by_modality.{n}." in key for key in missing)])
    return model
