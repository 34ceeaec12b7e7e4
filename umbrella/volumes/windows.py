"""Windows of a 4D series: the frames that one sample contains."""

import numpy as np

from umbrella.base import UserError
from umbrella.modality import Modality


def _window_length(modality: Modality) -> int:
    """Return the number of frames from the first to the last frame of a window, inclusive."""
    return (modality.grid[3] - 1) * modality.frame_stride + 1


def has_window(frames: int, modality: Modality) -> bool:
    """Return whether a series with this number of frames contains at least one window."""
    return frames >= _window_length(modality)


def num_windows(frames: int, modality: Modality) -> int:
    """Return the number of windows of a series. They start at frames ``0, window_stride, 2 * window_stride, ...``.

    Raises:
        UserError: if the series is shorter than one window.
    """
    length = _window_length(modality)
    if not has_window(frames, modality):
        raise UserError(
            f"has {frames} frames, and a window of {modality.grid[3]} frames at frame_stride {modality.frame_stride}"
            f" needs {length}; give its modality a shorter grid, or leave the series out"
        )
    return (frames - length) // modality.window_stride + 1


def pick_window(frames: int, modality: Modality, rng_key: tuple[int, ...] | None) -> slice:
    """Return the frames of one window as a slice.

    Args:
        frames: number of frames of the series.
        modality: gives the window's number of frames, ``frame_stride`` and ``window_stride``.
        rng_key: integer seed of a uniform random choice, such as (seed, epoch, sample). None: the middle window.
    """
    count = num_windows(frames, modality)
    index = (count - 1) // 2 if rng_key is None else int(np.random.default_rng(rng_key).integers(count))
    start = index * modality.window_stride
    return slice(start, start + _window_length(modality), modality.frame_stride)
