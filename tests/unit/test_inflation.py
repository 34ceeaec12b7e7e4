"""An embedder inflated from 2D weights: what it gives for repeated slices, other patch sizes, and positions."""

import pytest
import torch
from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from umbrella.modality import Modality
from umbrella.models.inflation import factorise_positions, inflate, inflate_patches
from umbrella.models.volume_embedder import ModalityEmbedder, VolumeEmbedder, resize_positions

FLAT = {"hidden_size": 6, "num_attention_heads": 1, "image_size": 12, "patch_size": 4}


@pytest.mark.parametrize("modality", [((6, 12, 12), (3, 4, 4)), ((6, 12, 12, 10), (3, 4, 4, 5))])
@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_a_volume_of_a_repeated_slice_gives_what_the_2d_embedder_gives_for_that_slice(
    modality: tuple, tower: str
) -> None:
    torch.manual_seed(0)
    flat = (
        SiglipVisionEmbeddings(SiglipVisionConfig(**FLAT))
        if tower == "siglip"
        else CLIPVisionEmbeddings(CLIPVisionConfig(**FLAT))
    )
    kind = Modality(grid=modality[0], patch=modality[1])
    embedder = VolumeEmbedder({"m": kind}, width=6, class_token=tower == "clip")
    inflate(embedder, flat)
    picture = torch.randn(12, 12)
    volume = picture.reshape(1, 1, 12, 12, *[1] * (len(kind.grid) - 3)).expand(1, *kind.grid)
    tokens = embedder(("m", volume))[:, -kind.num_tokens :].reshape(*kind.patch_grid, 6)
    positions = embedder(("m", torch.zeros_like(volume)))[:, -kind.num_tokens :].reshape(*kind.patch_grid, 6)
    bias = flat.patch_embedding.bias if tower == "siglip" else 0
    expected = flat.patch_embedding(picture.expand(1, 3, 12, 12))[0].permute(1, 2, 0) - bias  # (3, 3, 6)
    found = (tokens - positions).reshape(2, 3, 3, -1, 6)
    torch.testing.assert_close(found, expected[None, :, :, None].expand_as(found), rtol=0, atol=1e-5)


def test_a_patch_of_more_voxels_keeps_its_product_with_the_weights() -> None:
    torch.manual_seed(0)
    weight, picture = torch.randn(5, 1, 4, 3), torch.randn(4, 3)
    larger = resize_positions(resize_positions(picture, 7).T, 6).T  # linear, along rows and columns
    assert larger.shape == (7, 6)
    expected = (weight[:, 0] * picture).sum((1, 2))
    torch.testing.assert_close(inflate_patches(weight, (1, 7, 6)) @ larger.flatten(), expected, rtol=0, atol=1e-4)


def test_positions_that_are_a_sum_over_rows_and_columns_are_taken_apart_exactly() -> None:
    torch.manual_seed(0)
    rows, columns = torch.randn(3, 1, 6), torch.randn(1, 3, 6)
    axes = ModalityEmbedder(Modality(grid=(2, 3, 3, 2), patch=(1, 1, 1, 1)), 6).positions
    depth, row, column, time = factorise_positions(rows + columns, axes)
    volume = depth[:, None, None, None] + row[:, None, None] + column[:, None] + time
    torch.testing.assert_close(volume, (rows + columns)[None, :, :, None].expand(2, 3, 3, 2, 6))


def test_other_positions_are_fitted_as_well_as_a_sum_can() -> None:
    torch.manual_seed(0)
    table = torch.randn(3, 3, 6)
    axes = ModalityEmbedder(Modality(grid=(1, 3, 3), patch=(1, 1, 1)), 6).positions
    depth, row, column = factorise_positions(table, axes)
    design = torch.cat([torch.eye(3).repeat_interleave(3, 0), torch.eye(3).repeat(3, 1)], 1)
    best = design @ torch.linalg.pinv(design) @ table.reshape(9, 6)
    torch.testing.assert_close((depth[0] + row[:, None] + column).reshape(9, 6), best)
