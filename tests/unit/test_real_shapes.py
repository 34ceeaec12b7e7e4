"""The three published checkpoints, by their configurations, built on the meta device: parameters and tokens."""

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config
from transformers import SiglipVisionConfig as Siglip

from umbrella.modality import Modality
from umbrella.models.build import from_llava
from umbrella.models.trainable_parameters import component_parameters

SO400M = Siglip(
    hidden_size=1152,
    intermediate_size=4304,
    num_attention_heads=16,
    num_hidden_layers=26,
    image_size=384,
    patch_size=14,
    vision_use_head=False,
)
VIT_L = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=16,
    num_hidden_layers=24,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
INTERLEAVE = {"vision_config": SO400M, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llava-interleave-qwen-0.5b": {
        **INTERLEAVE,
        "text_config": Qwen2Config(
            hidden_size=1024,
            intermediate_size=2816,
            num_attention_heads=16,
            num_key_value_heads=16,
            num_hidden_layers=24,
            vocab_size=152_000,
            tie_word_embeddings=True,
        ),
    },
    "llava-interleave-qwen-7b": {
        **INTERLEAVE,
        "text_config": Qwen2Config(
            hidden_size=4096,
            intermediate_size=11_008,
            num_attention_heads=32,
            num_key_value_heads=32,
            num_hidden_layers=32,
            vocab_size=152_000,
        ),
    },
    "llava-1.5-7b": {
        "vision_config": VIT_L,
        "text_config": LlamaConfig(vocab_size=32_064),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    },
}
MODALITIES = {
    "sMRI": Modality(grid=(96, 96, 96), patch=(16, 16, 16)),
    "fMRI": Modality(grid=(96, 96, 96, 24), patch=(16, 16, 16, 3)),
}


@pytest.mark.parametrize(
    ("name", "flat", "tower", "projector", "language"),
    [
        # Worked out by hand from the widths; the last adds up to 7,063,427,072, which is what the hub shows for it.
        ("llava-interleave-qwen-0.5b", 1_518_336, 396_229_408, 2_230_272, 464_053_248),
        ("llava-interleave-qwen-7b", 1_518_336, 396_229_408, 21_504_000, 7_721_848_832),
        ("llava-1.5-7b", 1_193_984, 302_313_472, 20_979_712, 6_738_939_904),
    ],
)
def test_all_but_the_embedder_of_a_published_checkpoint_is_taken_over(
    name: str, flat: int, tower: int, projector: int, language: int
) -> None:
    with torch.device("meta"):
        plain = LlavaForConditionalGeneration(LlavaConfig(**CHECKPOINTS[name]))
    assert sum(p.numel() for p in plain.parameters()) == flat + tower + projector + language
    kinds = {name: modality.model_dump(mode="json") for name, modality in MODALITIES.items()}
    model = from_llava(plain, kinds)
    counts = {part: sum(w.numel() for w in weights) for part, weights in component_parameters(model).items()}
    width = model.config.vision_config.hidden_size
    own = (16**3 + 1 + 6 + 6 + 6) * width + (16**3 * 3 + 1 + 6 + 6 + 6 + 8) * width
    own += width if name == "llava-1.5-7b" else 0  # the class token
    assert counts == {"embedder": own, "tower": tower, "projector": projector, "language_model": language}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_volume_becomes_as_many_tokens_as_its_modality_says(name: str) -> None:
    with torch.device("meta"):
        plain = LlavaForConditionalGeneration(LlavaConfig(**CHECKPOINTS[name]))
    kinds = {name: modality.model_dump(mode="json") for name, modality in MODALITIES.items()}
    model = from_llava(plain, kinds)
    hidden = model.config.text_config.hidden_size
    for kind, tokens in (("sMRI", 216), ("fMRI", 1_728)):
        assert MODALITIES[kind].num_tokens == tokens
        voxels = torch.empty(2, *MODALITIES[kind].grid, device="meta")
        assert model.volume_features(kind, voxels).shape == (2, tokens, hidden)
