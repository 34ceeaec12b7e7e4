"""A modality says how many tokens a volume becomes, and refuses grids that it cannot cut."""

import pytest
from pydantic import ValidationError

from umbrella.modality import DEFAULT_MODALITIES, Modality


@pytest.mark.parametrize(
    ("grid", "patch", "tokens"),
    [
        ((96, 96, 96), (16, 16, 16), 216),
        ((96, 96, 96, 24), (16, 16, 16, 3), 1728),
        ((4, 6, 10), (2, 3, 5), 8),
    ],
)
def test_a_volume_becomes_one_token_per_patch(grid: tuple, patch: tuple, tokens: int) -> None:
    assert Modality(grid=grid, patch=patch).num_tokens == tokens


def test_an_anisotropic_patch_keeps_each_axis_apart() -> None:
    modality = Modality(grid=(4, 6, 10, 12), patch=(4, 3, 2, 6))
    assert modality.patch_grid == (1, 2, 5, 2)
    assert modality.patch_voxels == 144


def test_the_default_modalities_are_those_of_the_data_format() -> None:
    assert {name: m.num_tokens for name, m in DEFAULT_MODALITIES.items()} == {"sMRI": 27, "dMRI": 27, "fMRI": 32}


@pytest.mark.parametrize(
    ("grid", "patch", "message"),
    [
        ((8, 8, 8), (4, 4, 3), r"patch \(4, 4, 3\) does not divide grid \(8, 8, 8\)"),
        ((8, 8, 8, 4), (4, 4, 4), "different numbers of axes"),
        ((8, 8, 8), (4, 0, 4), "must be 1 or more"),
        ((8, 8, 8), (4, -4, 4), "must be 1 or more"),
        ((8, 8), (4, 4), "at least 3 items"),
    ],
)
def test_a_patch_that_does_not_fit_says_why(grid: tuple, patch: tuple, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Modality(grid=grid, patch=patch)
