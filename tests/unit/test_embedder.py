"""The embedder: patches, positions and token counts against plain loops, and its initialization from 2D weights."""

from itertools import product

import pytest
import torch
from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from umbrella.modality import Modality
from umbrella.models.volume_embedder import (
    ModalityEmbedder,
    VolumeEmbedder,
    factorise_positions,
    inflate,
    inflate_patches,
    patchify,
    resize_positions,
)

MODALITIES = {
    "sMRI": Modality(grid=(4, 6, 2), patch=(2, 3, 1)),
    "fMRI": Modality(grid=(2, 4, 3, 6), patch=(2, 2, 1, 3)),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODALITIES)
def test_patches_are_cut_in_c_order(name: str) -> None:
    modality = MODALITIES[name]
    (volume,) = volumes = torch.randn(1, *modality.grid)
    expected = [
        [
            volume[tuple(c * step + o for c, o, step in zip(corner, offset, modality.patch, strict=True))].item()
            for offset in product(*map(range, modality.patch))
        ]
        for corner in product(*map(range, modality.patch_grid))
    ]
    assert patchify(volumes, modality.patch)[0].tolist() == expected


@pytest.mark.parametrize("name", MODALITIES)
def test_position_is_the_sum_of_one_vector_per_axis(name: str) -> None:
    modality = MODALITIES[name]
    embedder = ModalityEmbedder(modality, width=5)
    positions = embedder(torch.zeros(1, *modality.grid))[0]  # the bias starts at zero
    expected = [
        sum(table[i] for table, i in zip(embedder.positions, corner, strict=True))
        for corner in product(*map(range, modality.patch_grid))
    ]
    torch.testing.assert_close(positions, torch.stack(expected))
    assert len({tuple(row) for row in positions.tolist()}) == modality.num_tokens


@pytest.mark.parametrize("class_token", [False, True])
def test_each_modality_has_its_own_weights_and_number_of_tokens_after_the_class_token(class_token: bool) -> None:
    embedder = VolumeEmbedder(MODALITIES, width=8, class_token=class_token)
    for name, modality in MODALITIES.items():
        voxels = torch.randn(3, *modality.grid, dtype=torch.float16)
        tokens = embedder((name, voxels))
        assert tokens.shape == (3, class_token + modality.num_tokens, 8)
        assert torch.equal(tokens[:, class_token:], embedder.by_modality[name](voxels))
        assert all(torch.equal(token, embedder.class_embedding) for one in tokens for token in one[:class_token])
        tokens.sum().backward()
        others = [m for other, m in embedder.by_modality.items() if other != name]
        assert all(p.grad is not None for p in embedder.by_modality[name].parameters())
        assert all(p.grad is None for m in others for p in m.parameters())
        embedder.zero_grad()


def test_z_scored_patch_gets_an_embedding_of_about_unit_variance() -> None:
    embedder = ModalityEmbedder(Modality(grid=(32, 32, 32), patch=(8, 8, 8)), width=64)
    assert abs(embedder(torch.randn(4, 32, 32, 32)).std().item() - 1) < 0.1


def test_positions_are_interpolated_linearly_to_another_grid() -> None:
    embedder = ModalityEmbedder(Modality(grid=(2, 3, 1, 4), patch=(1, 1, 1, 2)), width=5)
    x, y, z, t = (table.detach() for table in embedder.positions)
    embedder.fit_grid((4, 3, 2, 1))
    wider = torch.stack([x[0], 0.75 * x[0] + 0.25 * x[1], 0.25 * x[0] + 0.75 * x[1], x[1]])
    torch.testing.assert_close([*embedder.positions], [wider, y, z.expand(2, 5), t.mean(0, keepdim=True)])
    assert embedder(torch.zeros(1, 4, 3, 2, 2)).shape == (1, embedder.num_tokens, 5) == (1, 24, 5)


@pytest.mark.parametrize("modality", [((6, 12, 12), (3, 4, 4)), ((6, 12, 12, 10), (3, 4, 4, 5))], ids=["3D", "4D"])
@pytest.mark.parametrize(
    ("embeddings", "config"),
    [(SiglipVisionEmbeddings, SiglipVisionConfig), (CLIPVisionEmbeddings, CLIPVisionConfig)],
    ids=["siglip", "clip"],
)
def test_inflated_embedder_of_a_repeated_slice_equals_the_2d_embedder_of_that_slice(
    modality: tuple, embeddings: type, config: type
) -> None:
    flat = embeddings(config(hidden_size=6, num_attention_heads=1, image_size=12, patch_size=4))
    kind, is_clip = Modality(grid=modality[0], patch=modality[1]), config is CLIPVisionConfig
    embedder = VolumeEmbedder({"m": kind}, width=6, class_token=is_clip)
    inflate(embedder, flat)
    picture = torch.randn(12, 12)
    volume = picture.reshape(1, 1, 12, 12, *[1] * (len(kind.grid) - 3)).expand(1, *kind.grid)
    tokens, positions = (embedder(("m", v))[:, is_clip:] for v in (volume, torch.zeros_like(volume)))
    bias = 0 if is_clip else flat.patch_embedding.bias
    expected = flat.patch_embedding(picture.expand(1, 3, 12, 12))[0].permute(1, 2, 0) - bias  # (3, 3, 6)
    found = (tokens - positions).reshape(2, 3, 3, -1, 6)
    torch.testing.assert_close(found, expected[None, :, :, None].expand_as(found), rtol=0, atol=1e-5)


def test_resized_patch_weights_keep_their_product_with_a_resized_patch() -> None:
    weight, picture = torch.randn(5, 1, 4, 3), torch.randn(4, 3)
    larger = resize_positions(resize_positions(picture, 7).T, 6).T  # linear, along rows and columns
    expected = (weight[:, 0] * picture).sum((1, 2))
    torch.testing.assert_close(inflate_patches(weight, (1, 7, 6)) @ larger.flatten(), expected, rtol=0, atol=1e-4)


def test_2d_positions_are_factorised_exactly_if_they_are_a_sum_and_by_least_squares_otherwise() -> None:
    rows, columns = torch.randn(3, 1, 6), torch.randn(1, 3, 6)
    depth, row, column, time = factorise_positions(rows + columns, (2, 3, 3, 2))
    volume = depth[:, None, None, None] + row[:, None, None] + column[:, None] + time
    torch.testing.assert_close(volume, (rows + columns)[None, :, :, None].expand(2, 3, 3, 2, 6))
    table = torch.randn(3, 3, 6)
    depth, row, column = factorise_positions(table, (1, 3, 3))
    design = torch.cat([torch.eye(3).repeat_interleave(3, 0), torch.eye(3).repeat(3, 1)], 1)
    best = design @ torch.linalg.pinv(design) @ table.reshape(9, 6)
    torch.testing.assert_close((depth[0] + row[:, None] + column).reshape(9, 6), best)
