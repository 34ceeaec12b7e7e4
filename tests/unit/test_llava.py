"""Against the LLaVA of transformers: equal hidden states for one slice; parameters and tokens of published models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from umbrella.data.batching import VolumeGroup
from umbrella.modality import Modality, class_tokens
from umbrella.models.build import build_model, component_parameters, from_llava
from umbrella.models.settings import ModelSettings

SLICE = {"sMRI": Modality(grid=(1, 8, 8), patch=(1, 4, 4)), "fMRI": Modality(grid=(1, 8, 8, 1), patch=(1, 4, 4, 1))}
IMAGE = 259


@pytest.mark.parametrize("language", ["qwen2", "llama"])
@pytest.mark.parametrize(
    ("tower", "strategy", "layer"),
    [("siglip", "full", -1), ("clip", "default", -2), ("clip", "full", -1), ("clip", "default", [-2, -1])],
)
def test_inflated_model_has_the_hidden_states_of_llava_for_a_volume_of_one_slice(
    save_llava: Callable[..., Any], tmp_path: Path, tower: str, strategy: str, layer: Any, language: str
) -> None:
    options = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy, "image_token_index": IMAGE}
    plain = save_llava(tmp_path, tower, language, **options)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # positions that are a sum over rows and columns, as those of a volume over its axes
        table = plain.model.vision_tower.embeddings.position_embedding.weight
        rows, columns = torch.randn(2, 1, 16, generator=draw), torch.randn(1, 2, 16, generator=draw)
        table[-4:] = (rows + columns).reshape(4, 16)
    plain.save_pretrained(tmp_path)
    settings = ModelSettings(checkpoint=str(tmp_path), embedder_init="inflated")
    model = build_model(settings, SLICE, 260, IMAGE).eval()

    slices = torch.randn(2, 8, 8, generator=draw)
    run = [IMAGE] * (4 + class_tokens(plain.config.vision_config.model_type, strategy))
    input_ids = torch.tensor([[5, *run, 6, 7, *run, 8]])
    volumes = {
        "fMRI": VolumeGroup(slices[1:, None, :, :, None], torch.tensor([1])),
        "sMRI": VolumeGroup(slices[:1, None], torch.tensor([0])),
    }
    images = slices[:, None].expand(-1, 3, -1, -1)
    with torch.no_grad():
        expected = plain(input_ids, pixel_values=images, output_hidden_states=True)
        found = model(input_ids, torch.ones_like(input_ids), volumes, output_hidden_states=True)
    assert len(expected.hidden_states) == 3
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


def layers(width: int, inner: int, heads: int, count: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_hidden_layers": count,
    }


SIGLIP_SO400M = SiglipVisionConfig(**layers(1152, 4304, 16, 26), image_size=384, patch_size=14, vision_use_head=False)
CLIP_VIT_L = CLIPVisionConfig(**layers(1024, 4096, 16, 24), image_size=336, patch_size=14, projection_dim=768)
INTERLEAVE = {"vision_config": SIGLIP_SO400M, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
MODALITIES = {
    "sMRI": Modality(grid=(96, 96, 96), patch=(16, 16, 16)),
    "fMRI": Modality(grid=(96, 96, 96, 24), patch=(16, 16, 16, 3)),
}


@pytest.mark.parametrize(
    ("config", "flat", "tower", "projector", "language"),
    [
        # Computed by hand from the widths; the last adds up to 7,063,427,072, which is what the hub shows for it.
        pytest.param(
            INTERLEAVE
            | {
                "text_config": Qwen2Config(
                    **layers(1024, 2816, 16, 24), num_key_value_heads=16, vocab_size=152_000, tie_word_embeddings=True
                )
            },
            *(1_518_336, 396_229_408, 2_230_272, 464_053_248),
            id="llava-interleave-qwen-0.5b",
        ),
        pytest.param(
            {
                "vision_config": CLIP_VIT_L,
                "text_config": LlamaConfig(vocab_size=32_064),
                "vision_feature_layer": -2,
                "vision_feature_select_strategy": "default",
            },
            *(1_193_984, 302_313_472, 20_979_712, 6_738_939_904),
            id="llava-1.5-7b",
        ),
    ],
)
def test_published_checkpoint_keeps_all_but_its_2d_embeddings_and_has_the_tokens_of_the_modality(
    config: dict[str, Any], flat: int, tower: int, projector: int, language: int
) -> None:
    with torch.device("meta"):
        plain = LlavaForConditionalGeneration(LlavaConfig(**config))
    assert sum(p.numel() for p in plain.parameters()) == flat + tower + projector + language
    model = from_llava(plain, MODALITIES)
    width, is_clip = model.config.vision_config.hidden_size, config["vision_config"] is CLIP_VIT_L
    own = (16**3 + 1 + 6 + 6 + 6) * width + (16**3 * 3 + 1 + 6 + 6 + 6 + 8) * width + is_clip * width
    counts = {part: sum(w.numel() for w in weights) for part, weights in component_parameters(model).items()}
    assert counts == {"embedder": own, "tower": tower, "projector": projector, "language_model": language}
    for name, tokens in (("sMRI", 216), ("fMRI", 1_728)):
        voxels = torch.empty(1, *MODALITIES[name].grid, device="meta")
        assert MODALITIES[name].num_tokens == tokens
        assert model.volume_features(name, voxels).shape == (1, tokens, model.config.text_config.hidden_size)
