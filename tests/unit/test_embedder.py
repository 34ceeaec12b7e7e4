"""The embedder: patches, positions and token counts, against references with plain loops."""

import itertools

import pytest
import torch

from umbrella.modality import Modality
from umbrella.models.volume_embedder import ModalityEmbedder, VolumeEmbedder, patchify

MODALITIES = {
    "sMRI": Modality(grid=(4, 6, 2), patch=(2, 3, 1)),
    "fMRI": Modality(grid=(2, 4, 3, 6), patch=(2, 2, 1, 3)),
}


@pytest.mark.parametrize("name", ["sMRI", "fMRI"])
def test_patches_are_cut_as_written_out_voxel_by_voxel(name: str) -> None:
    modality = MODALITIES[name]
    volumes = torch.randn(2, *modality.grid, generator=torch.Generator().manual_seed(0))
    expected = []
    for volume in volumes:
        patches = []
        for corner in itertools.product(*(range(n) for n in modality.patch_grid)):
            voxels = []
            for offset in itertools.product(*(range(n) for n in modality.patch)):
                place = [c * step + o for c, o, step in zip(corner, offset, modality.patch, strict=True)]
                voxels.append(volume[tuple(place)].item())
            patches.append(voxels)
        expected.append(patches)
    torch.testing.assert_close(patchify(volumes, modality.patch), torch.tensor(expected), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sMRI", "fMRI"])
def test_a_position_is_the_sum_of_one_vector_per_axis(name: str) -> None:
    modality = MODALITIES[name]
    torch.manual_seed(0)
    embedder = ModalityEmbedder(modality, width=5)
    positions = embedder(torch.zeros(1, *modality.grid))[0]  # the bias starts at zero
    expected = [
        sum(table[i] for table, i in zip(embedder.positions, corner, strict=True))
        for corner in itertools.product(*(range(n) for n in modality.patch_grid))
    ]
    torch.testing.assert_close(positions, torch.stack(expected))
    assert len({tuple(row) for row in positions.tolist()}) == modality.num_tokens


def test_each_modality_has_weights_and_a_token_count_of_its_own() -> None:
    embedder = VolumeEmbedder(MODALITIES, width=8)
    for name, modality in MODALITIES.items():
        tokens = embedder((name, torch.randn(3, *modality.grid, dtype=torch.float16)))
        assert tokens.shape == (3, modality.num_tokens, 8)
        tokens.sum().backward()
        others = [m for other, m in embedder.by_modality.items() if other != name]
        assert all(p.grad is not None for p in embedder.by_modality[name].parameters())
        assert all(p.grad is None for m in others for p in m.parameters())
        embedder.zero_grad()


def test_a_z_scored_patch_becomes_a_vector_of_about_unit_variance() -> None:
    torch.manual_seed(0)
    embedder = ModalityEmbedder(Modality(grid=(32, 32, 32), patch=(8, 8, 8)), width=64)
    assert abs(embedder(torch.randn(4, 32, 32, 32)).std().item() - 1) < 0.1


def test_a_volume_of_another_grid_has_positions_between_the_trained_ones() -> None:
    torch.manual_seed(0)
    embedder = ModalityEmbedder(Modality(grid=(2, 3, 1, 4), patch=(1, 1, 1, 2)), width=5)
    x, y, z, t = (table.detach() for table in embedder.positions)
    tokens = embedder(torch.zeros(1, 4, 3, 2, 2)).reshape(4, 3, 2, 1, 5)
    wider = torch.stack([x[0], 0.75 * x[0] + 0.25 * x[1], 0.25 * x[0] + 0.75 * x[1], x[1]])
    expected = wider[:, None, None, None] + y[:, None, None] + z.expand(2, 5)[:, None] + t.mean(0)
    torch.testing.assert_close(tokens, expected)


def test_the_class_token_stands_before_the_patches_of_every_volume() -> None:
    embedder = VolumeEmbedder(MODALITIES, width=8, class_token=True)
    voxels = torch.randn(3, *MODALITIES["sMRI"].grid)
    tokens = embedder(("sMRI", voxels))
    assert tokens.shape == (3, 1 + MODALITIES["sMRI"].num_tokens, 8)
    assert all(torch.equal(one, embedder.class_embedding) for one in tokens[:, 0])
    assert torch.equal(tokens[:, 1:], embedder.by_modality["sMRI"](voxels))
