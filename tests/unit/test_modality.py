"""Modalities: tokens of a volume, invalid grids, and the frames of a series that a sample contains."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from umbrella.base import UserError
from umbrella.modality import DEFAULT_MODALITIES, Modality


@pytest.mark.parametrize(
    ("grid", "patch", "patches", "tokens"),
    [
        ((96, 96, 96), (16, 16, 16), (6, 6, 6), 216),
        ((96, 96, 96, 24), (16, 16, 16, 3), (6, 6, 6, 8), 1728),
        ((4, 6, 10, 12), (4, 3, 2, 6), (1, 2, 5, 2), 20),
    ],
)
def test_a_volume_has_one_token_per_patch(grid: tuple, patch: tuple, patches: tuple, tokens: int) -> None:
    modality = Modality(grid=grid, patch=patch)
    assert (modality.patch_grid, modality.num_tokens) == (patches, tokens)
    assert modality.patch_voxels * tokens == np.prod(grid)


def test_default_modalities_have_few_tokens() -> None:
    assert {name: m.num_tokens for name, m in DEFAULT_MODALITIES.items()} == {"sMRI": 27, "dMRI": 27, "fMRI": 32}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch": (4, 4, 3)}, r"patch \(4, 4, 3\) does not divide grid \(8, 8, 8\)"),
        ({"grid": (8, 8, 8, 4)}, "different numbers of axes"),
        ({"patch": (4, 0, 4)}, "must be 1 or more"),
        ({"patch": (4, -4, 4)}, "must be 1 or more"),
        ({"grid": (8, 8), "patch": (4, 4)}, "at least 3 items"),
        ({"fit": "spacing"}, "spacing, in millimetres, belongs to fit: spacing"),
        ({"percentiles": (60, 10)}, "are not two rising numbers from 0 to 100"),
    ],
)
def test_invalid_modalities_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Modality(**{"grid": (8, 8, 8), "patch": (4, 4, 4), **values})


def fmri(length: int, frame_stride: int = 1, window_stride: int = 1) -> Modality:
    grid, patch = (1, 1, 1, length), (1, 1, 1, 1)
    return Modality(grid=grid, patch=patch, frame_stride=frame_stride, window_stride=window_stride)


@pytest.mark.parametrize(
    ("frames", "modality", "count", "middle"),
    [
        (24, fmri(24), 1, slice(0, 24, 1)),
        (25, fmri(24), 2, slice(0, 24, 1)),
        (10, fmri(4, 3), 1, slice(0, 10, 3)),
        (12, fmri(4, 3), 3, slice(1, 11, 3)),
        (30, fmri(10, 1, 10), 3, slice(10, 20, 1)),
        (29, fmri(10, 1, 10), 2, slice(0, 10, 1)),
        (17, fmri(4, 2, 3), 4, slice(3, 10, 2)),
    ],
)
def test_number_of_windows_and_middle_window(frames: int, modality: Modality, count: int, middle: slice) -> None:
    assert modality.num_windows(frames) == count
    assert modality.pick_window(frames, None) == middle


shapes = st.builds(fmri, st.integers(1, 12), st.integers(1, 4), st.integers(1, 5))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 80), shapes, st.one_of(st.none(), st.tuples(st.integers(0, 99), st.integers(0, 99))))
def test_windows_lie_inside_the_series_at_their_strides(frames: int, modality: Modality, rng_key: tuple | None) -> None:
    if frames < modality.window_length:
        with pytest.raises(UserError, match=f"has {frames} frames, and a window of {modality.grid[3]} frames"):
            modality.pick_window(frames, rng_key)
        return
    window = modality.pick_window(frames, rng_key)
    seen = np.arange(frames)[window]
    assert len(seen) == modality.grid[3]
    assert window.start in range(0, modality.num_windows(frames) * modality.window_stride, modality.window_stride)
    assert set(np.diff(seen)) <= {modality.frame_stride}


def test_random_windows_are_a_function_of_the_key_and_cover_all_windows() -> None:
    modality = fmri(4, 2, 3)  # 7 frames long; starts are 0, 3, 6, 9
    starts = [modality.pick_window(17, (0, epoch, 5)).start for epoch in range(60)]
    assert set(starts) == {0, 3, 6, 9}
    assert starts == [modality.pick_window(17, (0, epoch, 5)).start for epoch in range(60)]
