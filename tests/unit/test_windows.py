"""Windows: which frames of a series a sample sees is arithmetic that can be done by hand, and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbrella.base import UserError
from umbrella.modality import Modality
from umbrella.volumes.windows import has_window, num_windows, pick_window


def fmri(length: int, frame_stride: int = 1, window_stride: int = 1) -> Modality:
    grid, patch = (1, 1, 1, length), (1, 1, 1, 1)
    return Modality(grid=grid, patch=patch, frame_stride=frame_stride, window_stride=window_stride)


shapes = st.builds(fmri, st.integers(1, 12), st.integers(1, 4), st.integers(1, 5))


@pytest.mark.parametrize(
    ("frames", "modality", "count"),
    [
        (24, fmri(24), 1),
        (25, fmri(24), 2),
        (10, fmri(4, 3), 1),
        (12, fmri(4, 3), 3),
        (30, fmri(10, 1, 10), 3),
        (29, fmri(10, 1, 10), 2),
    ],
)
def test_windows_counted_by_hand(frames: int, modality: Modality, count: int) -> None:
    assert num_windows(frames, modality) == count


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 80), shapes, st.one_of(st.none(), st.tuples(st.integers(0, 99), st.integers(0, 99))))
def test_every_window_has_its_frames_inside_the_series_at_its_strides(
    frames: int, modality: Modality, rng_key: tuple | None
) -> None:
    if not has_window(frames, modality):
        with pytest.raises(UserError, match=f"has {frames} frames, and a window of {modality.grid[3]} frames"):
            pick_window(frames, modality, rng_key)
        return
    window = pick_window(frames, modality, rng_key)
    seen = np.arange(frames)[window]
    assert len(seen) == modality.grid[3]
    assert window.start % modality.window_stride == 0
    assert window.start // modality.window_stride < num_windows(frames, modality)
    assert set(np.diff(seen)) <= {modality.frame_stride}


def test_training_draws_every_window_and_the_same_numbers_draw_the_same() -> None:
    modality = fmri(4, 2, 3)  # spans 7 frames; starts 0, 3, 6, 9
    drawn = [pick_window(17, modality, (0, epoch, 5)).start for epoch in range(60)]
    assert set(drawn) == {0, 3, 6, 9}
    assert drawn == [pick_window(17, modality, (0, epoch, 5)).start for epoch in range(60)]


def test_evaluation_always_sees_the_middle_window() -> None:
    assert pick_window(24, fmri(24), None) == slice(0, 24, 1)
    assert pick_window(17, fmri(4, 2, 3), None) == slice(3, 10, 2)
    assert pick_window(100, fmri(10), None).start == 45
