"""Beside transformers' own LLaVA: a volume of one slice through the inflated 2D weights gives what the image gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from umbrella.data.batching import VolumeGroup
from umbrella.modality import Modality, class_tokens
from umbrella.models.build import build_model
from umbrella.models.settings import ModelSettings

SLICE = {"sMRI": Modality(grid=(1, 8, 8), patch=(1, 4, 4)), "fMRI": Modality(grid=(1, 8, 8, 1), patch=(1, 4, 4, 1))}
IMAGE = 259


@pytest.mark.parametrize("language", ["qwen2", "llama"])
@pytest.mark.parametrize(
    ("tower", "strategy", "layer"),
    [
        ("siglip", "full", -1),
        ("siglip", "full", -2),
        ("clip", "default", -2),
        ("clip", "full", -1),
        ("clip", "default", [-2, -1]),
    ],
)
def test_hidden_states_match_transformers_llava(
    save_llava: Callable[..., Any], tmp_path: Path, tower: str, strategy: str, layer: Any, language: str
) -> None:
    options = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy, "image_token_index": IMAGE}
    plain = save_llava(tmp_path, tower, language, **options)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # positions that are a sum over rows and columns, as a volume's are over its axes
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
