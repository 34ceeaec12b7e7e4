"""Where a model comes from: made tiny in code, from a plain LLaVA checkpoint, or from a saved model of ours."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import GenerationConfig, Qwen2Config, SiglipVisionConfig

from umbrella.modality import Modality
from umbrella.model.loading import load_model
from umbrella.model.selection import add_lora, select_trainable
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
