"""Windows of a series: which frames of it a sample sees."""

import numpy as np

from umbrella.base import UserError
from umbrella.modality import Modality


def _span(modality: Modality) -> int:
    """Frames from the first to the last of a window, both counted."""
    return (modality.grid[3] - 1) * modality.frame_stride + 1


def has_window(frames: int, modality: Modality) -> bool:
    """Whether a series of so many frames is long enough for a window."""
    return frames >= _span(modality)


def num_windows(frames: int, modality: Modality) -> int:
    """How many windows a series has: those that start at ``0, window_stride, ...`` and end inside it.

    Raises:
        UserError: none fits.
    """
    span = _span(modality)
    if not has_window(frames, modality):
        raise UserError(
            f"has {frames} frames, and a window of {modality.grid[3]} frames at frame_stride {modality.frame_stride}"
            f" needs {span}; give its modality a shorter grid, or leave the series out"
        )
    return (frames - span) // modality.window_stride + 1


def pick_window(frames: int, modality: Modality, rng_key: tuple[int, ...] | None) -> slice:
    """The frames of one window, in order.

    Args:
        frames: how many the series has.
        rng_key: seed of the random choice, such as (seed, epoch, sample); equal keys give the same window.
            All windows are equally likely. None selects the middle window.
    """
    count = num_windows(frames, modality)
    index = (count - 1) // 2 if rng_key is None else int(np.random.default_rng(rng_key).integers(count))
    start = index * modality.window_stride
    return slice(start, start + _span(modality), modality.frame_stride)
