"""Preprocessing: grid and intensities of a volume are those of its modality."""

from typing import Any

import numpy as np
import pytest

from umbrella.modality import Modality
from umbrella.volumes.preprocessing import Axis, recipe, resample_to_grid, scale_intensity
from umbrella.volumes.reading import RawVolume


def raw(voxels: np.ndarray, spacing: tuple[float, ...] = (1, 1, 1), slope: float = 1, inter: float = 0) -> RawVolume:
    return RawVolume(np.asarray(voxels, np.float32), slope, inter, np.diag([*spacing, 1.0]))


def modality(*grid: int, **others: Any) -> Modality:
    return Modality(grid=grid, patch=(1,) * len(grid), **others)


def prepare(volume: RawVolume, target: Modality) -> np.ndarray:
    return scale_intensity(*resample_to_grid(volume, target), target)


@pytest.mark.parametrize("grid", [(4, 4, 4), (16, 16, 16), (14, 3, 4)])
def test_zscore_gives_half_precision_with_mean_0_and_deviation_1(brain: np.ndarray, grid: tuple) -> None:
    array = prepare(raw(1000 + brain), modality(*grid))
    assert (array.dtype, array.shape) == (np.float16, grid)
    assert abs(array.mean(dtype=np.float64)) < 1e-3
    assert abs(array.std(dtype=np.float64) - 1) < 1e-3


@pytest.mark.parametrize(
    ("axis", "weights"),
    [
        (Axis(4, 2, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
        (Axis(3, 2, 1.5), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]),
        (Axis(2, 4, 0.5), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]),
    ],
)
def test_shrinking_axes_are_averaged_and_growing_ones_interpolated(axis: Axis, weights: list) -> None:
    np.testing.assert_allclose(axis.weights, weights, atol=1e-7)


@pytest.mark.parametrize(("size", "target", "step"), [(5, 9, 1), (9, 4, 1), (6, 12, 0.7), (20, 6, 2.5), (1, 4, 0.25)])
def test_the_centre_of_an_axis_stays_the_centre(size: int, target: int, step: float) -> None:
    weights = Axis(size, target, step).weights
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)


def test_spacing_crops_and_pads_around_the_centre_with_the_background() -> None:
    voxels = np.full((4, 2, 6), 5.0)
    voxels[0, 0, 1] = 9
    same = modality(6, 2, 4, fit="spacing", spacing=2.0, background=-1.0)
    values, foreground = resample_to_grid(raw(voxels, (2, 2, 2)), same)
    expected = np.full((6, 2, 4), -1.0)
    expected[1:5] = 5
    expected[1, 0, 0] = 9
    np.testing.assert_allclose(values, expected)
    np.testing.assert_array_equal(foreground, expected > 0)


def test_spacing_is_in_millimetres_along_every_axis() -> None:
    ramp = np.broadcast_to(np.arange(8.0)[:, None, None], (8, 4, 2))
    halved = modality(4, 4, 4, fit="spacing", spacing=2.0)
    values, _ = resample_to_grid(raw(ramp, (1, 2, 4)), halved)  # 8 x 8 x 8 mm
    np.testing.assert_allclose(values, np.broadcast_to(np.array([0.5, 2.5, 4.5, 6.5])[:, None, None], (4, 4, 4)))


def test_slope_and_intercept_are_applied() -> None:
    stored = raw([[[0, 1], [2, 3]]], slope=-2, inter=4)
    values, foreground = resample_to_grid(stored, modality(1, 2, 2, background=4.0))
    np.testing.assert_allclose(values, [[[4, 2], [0, -2]]])
    np.testing.assert_array_equal(foreground, [[[False, True], [True, True]]])


@pytest.mark.parametrize(("intensity", "background"), [("zscore_foreground", 0), ("zscore_background_min", 2)])
def test_foreground_scaling_leaves_the_background_out(intensity: Any, background: float) -> None:
    voxels = np.array([0, 0, 2, 4, 6, 8], np.float32).reshape(1, 2, 3)
    expected = (np.array([background, background, 2, 4, 6, 8]) - 5) / np.std([2, 4, 6, 8])
    scaled = prepare(raw(voxels), modality(1, 2, 3, intensity=intensity))
    np.testing.assert_allclose(scaled.ravel(), expected, atol=2e-3)


def test_percentiles_become_0_and_1_and_clip() -> None:
    voxels = np.arange(101, dtype=np.float32).reshape(101, 1, 1)
    array = prepare(raw(voxels), modality(101, 1, 1, intensity="percentiles", percentiles=(10, 60))).ravel()
    np.testing.assert_allclose(array, np.clip((np.arange(101) - 10) / 50, 0, 1), atol=1e-3)


def test_frames_are_resampled_apart_and_scaled_together() -> None:
    frames = np.array([5, -3, 2, 11, 100], dtype=np.float32)
    series = np.broadcast_to(frames, (3, 3, 3, 5)).copy()
    array = prepare(raw(series), modality(2, 4, 2, 3))
    expected = (frames - frames.mean()) / frames.std()
    np.testing.assert_allclose(array, np.broadcast_to(expected[:, None, None, None], (5, 2, 4, 2)), atol=0.02)


def test_small_units_do_not_make_a_map_constant(brain: np.ndarray) -> None:
    grid = modality(4, 4, 4)
    np.testing.assert_allclose(prepare(raw(1e-10 * brain), grid), prepare(raw(brain), grid), atol=2e-3)


def test_recipes_depend_on_what_changes_the_array_only() -> None:
    base = {"grid": (4, 4, 4, 6), "patch": (2, 2, 2, 2)}
    same: list[dict] = [{"patch": (4, 4, 4, 3)}, {"window_stride": 5}, {"frame_stride": 2}, {"grid": (4, 4, 4, 4)}]
    same += [{"percentiles": (2, 98)}]  # which this intensity does not use
    other: list[dict] = [{"grid": (4, 4, 8, 6)}, {"fit": "spacing", "spacing": 2.0}, {"intensity": "percentiles"}]
    other += [{"background": 1}, {"nan": "background"}]
    mine = recipe(Modality(**base))
    assert "nan" not in mine  # nor was it in the recipes of older stores
    assert all(recipe(Modality(**base | change)) == mine for change in same)
    assert all(recipe(Modality(**base | change)) != mine for change in other)
