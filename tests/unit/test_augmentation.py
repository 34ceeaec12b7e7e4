"""Augmentation: what is done to volumes, on which axis and in which direction, and what decides the random numbers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import ndimage
from scipy.spatial.transform import Rotation

from umbrella.data.batching import Batch, VolumeGroup
from umbrella.training.augmentation import (
    _generator,
    apply_affine,
    augment,
    augment_volumes,
    draw_geometry,
    draw_intensity,
)
from umbrella.training.settings import AugmentSettings

NAMES = ("two", "none", "three")
RNG_KEYS = ((0, 3, 7), (0, 3, 8), (0, 3, 9))
EVERYTHING = AugmentSettings(
    flip_left_right=0.5, flip_other=0.5, rotate=20, scale=0.2, shift=0.1, contrast=0.3, brightness=0.5, noise=0.1
)
RIGHT, FRONT, TOP = torch.eye(3, dtype=torch.long)


@pytest.fixture
def batch(batch_of: Callable[..., Batch]) -> Batch:
    return batch_of(*NAMES, rng_keys=RNG_KEYS)


def by_run(batch: Batch) -> dict[int, torch.Tensor]:
    """Run of placeholders to the voxels that stand there."""
    placed = [pair for g in batch.pixel_values.values() for pair in zip(g.run.tolist(), g.voxels, strict=True)]
    return dict(sorted(placed, key=lambda pair: pair[0]))


def same(some: Batch, other: Batch) -> bool:
    found, expected = by_run(some), by_run(other)
    return found.keys() == expected.keys() and all(torch.equal(found[run], expected[run]) for run in found)


def with_volumes(batch: Batch, **volumes: torch.Tensor) -> Batch:
    """A batch of one sample, "two", that shows other volumes: fMRI first, then sMRI."""
    groups = {
        name: VolumeGroup(voxels[None].half(), batch.pixel_values[name].run[:1]) for name, voxels in volumes.items()
    }
    return replace(batch[0], pixel_values=groups)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# What is switched off


def test_by_default_the_batch_stays_the_very_same(batch: Batch) -> None:
    assert augment(batch, AugmentSettings()) is batch


def test_a_batch_without_draws_as_in_evaluation_stays_the_very_same(batch_of: Callable[..., Batch]) -> None:
    batch = batch_of(*NAMES)
    assert batch.rng_keys == batch[1:].rng_keys == ()
    assert augment(batch, EVERYTHING) is batch


@pytest.mark.parametrize("name", AugmentSettings.model_fields)
def test_each_option_alone_changes_every_volume_and_leaves_the_batch_it_came_from(batch: Batch, name: str) -> None:
    before = {run: voxels.clone() for run, voxels in by_run(batch).items()}
    changed = by_run(augment(batch, AugmentSettings(**{name: 30 if name == "rotate" else 1 - 2**-20})))
    for run, voxels in by_run(batch).items():
        assert torch.equal(voxels, before[run])
        assert not torch.equal(voxels, changed[run])
        assert (changed[run].shape, changed[run].dtype) == (voxels.shape, torch.float16)


def test_text_alone_has_nothing_to_change(batch: Batch) -> None:
    assert augment(batch[1], EVERYTHING).pixel_values == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("flip_left_right", 1.1), ("flip_other", -0.1), ("rotate", 181), ("scale", 1), ("shift", -0.1)),
        *(("contrast", 1), ("brightness", -0.1), ("noise", -0.1)),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match=name):
        AugmentSettings(**{name: value})


# Geometry


def test_a_left_right_flip_mirrors_x_and_nothing_else_exactly(batch: Batch) -> None:
    flipped = by_run(augment(batch, AugmentSettings(flip_left_right=1)))
    for run, voxels in by_run(batch).items():
        assert torch.equal(flipped[run], torch.stack([voxels[x] for x in (3, 2, 1, 0)]))


def test_the_other_flips_mirror_y_and_z_and_nothing_else_exactly(batch: Batch) -> None:
    flipped = by_run(augment(batch, AugmentSettings(flip_other=1)))
    for run, voxels in by_run(batch).items():
        assert torch.equal(flipped[run], voxels[:, [3, 2, 1, 0]][:, :, [3, 2, 1, 0]])


def test_a_probability_flips_some_samples_and_leaves_the_others_exactly_as_they_are(batch: Batch) -> None:
    settings, volume = AugmentSettings(flip_left_right=0.25), by_run(batch)[0]
    seen = [by_run(augment(replace(batch, rng_keys=((0, 0, i),) * 3), settings))[0] for i in range(200)]
    flipped = sum(torch.equal(voxels, volume.flip(0)) for voxels in seen)
    assert 30 < flipped < 70
    assert sum(torch.equal(voxels, volume) for voxels in seen) == 200 - flipped


def moved(volume: torch.Tensor, linear: Any = None, shift: Any = (0, 0, 0)) -> torch.Tensor:
    linear = np.eye(3) if linear is None else linear
    return apply_affine(volume[None, None].float(), np.asarray(linear)[None], np.asarray(shift)[None])[0, 0]


@pytest.mark.parametrize(("axis", "start", "end"), [("x", FRONT, TOP), ("y", TOP, RIGHT), ("z", RIGHT, FRONT)])
def test_a_quarter_turn_takes_what_lies_on_one_axis_to_the_next(axis: str, start: Any, end: Any) -> None:
    before, after = torch.zeros(2, 5, 5, 5)
    before[tuple(2 + start)] = before[tuple(2 - 2 * end)] = 1
    after[tuple(2 + end)] = after[tuple(2 + 2 * start)] = 1
    turn = Rotation.from_euler(axis, 90, degrees=True).as_matrix()
    torch.testing.assert_close(moved(before, turn), after, rtol=0, atol=1e-5)


def test_a_turn_is_one_of_cubic_voxels_whatever_the_grid() -> None:
    before, after = torch.zeros(2, 3, 5, 7)
    before[1, 3, 3] = after[0, 2, 3] = 1  # one voxel to the front of the centre, one to the left of it
    turn = Rotation.from_euler("z", 90, degrees=True).as_matrix()
    torch.testing.assert_close(moved(before, turn), after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shift_moves_towards_right_front_and_top_and_repeats_the_border(axis: int) -> None:
    line, shape = torch.tensor([1.0, 2.0, 3.0, 5.0]), [-1 if a == axis else 1 for a in range(3)]
    shift = np.eye(3)[axis] / 4
    for sign, expected in ((1, [1.0, 1.0, 2.0, 3.0]), (-1, [2.0, 3.0, 5.0, 5.0])):
        found = moved(line.view(shape), shift=sign * shift).flatten()
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "expected"), [(2, [0.75, 1.25, 1.75, 2.25]), (0.5, [0.0, 0.5, 2.5, 3.0])])
def test_a_size_stretches_around_the_centre(size: float, expected: list[float]) -> None:
    line = torch.arange(4.0)[:, None, None].expand(4, 4, 4)
    found = moved(line, size * np.eye(3))
    torch.testing.assert_close(found, torch.tensor(expected)[:, None, None].expand(4, 4, 4), rtol=0, atol=1e-5)


def test_a_batch_is_mirrored_and_then_moved_as_its_draws_say(batch: Batch) -> None:
    """scipy, which asks where a voxel of the result comes from, says the same of every frame."""
    volumes = {"fMRI": random(6, 8, 10, 2), "sMRI": random(12, 7, 9)}
    before = with_volumes(batch, **volumes)
    settings = AugmentSettings(flip_left_right=0.5, flip_other=0.5, rotate=40, scale=0.3, shift=0.2)
    for sample in range(8):
        geometry = draw_geometry((0, 1, sample), settings)
        after = augment(replace(before, rng_keys=((0, 1, sample),)), settings)
        for name, voxels in volumes.items():
            *sizes, frames = (*voxels.shape, 1)[:4]
            mirrored = np.flip(voxels.half().float().numpy(), np.flatnonzero(geometry.mirror)).reshape(*sizes, frames)
            centre, back = (np.array(sizes) - 1) / 2, np.linalg.inv(geometry.linear)
            offset = centre - back @ (centre + geometry.shift * sizes)
            found = after.pixel_values[name].voxels[0].reshape(*sizes, frames)
            for frame in range(frames):
                expected = ndimage.affine_transform(mirrored[..., frame], back, offset, order=1, mode="nearest")
                np.testing.assert_allclose(found[..., frame].float(), expected, rtol=0, atol=5e-3)


def test_draws_of_geometry_reach_their_limits_and_no_further() -> None:
    settings = AugmentSettings(rotate=30, scale=0.2, shift=0.1)
    drawn = [draw_geometry((0, 0, i), settings) for i in range(500)]
    sizes = np.array([np.cbrt(np.linalg.det(g.linear)) for g in drawn])
    turns = [Rotation.from_matrix(g.linear / s) for g, s in zip(drawn, sizes, strict=True)]
    for values, middle, width in (
        (sizes, 1, 0.2),
        (np.stack([g.shift for g in drawn]), 0, 0.1),
        (np.stack([turn.as_euler("xyz", degrees=True) for turn in turns]), 0, 30),
    ):
        assert (np.abs(values - middle) <= width * (1 + 1e-9)).all()
        assert (values.min(0) < middle - 0.95 * width).all()
        assert (values.max(0) > middle + 0.95 * width).all()


def test_volumes_of_a_sample_and_frames_of_a_series_move_alike(batch: Batch) -> None:
    volume = random(4, 4, 4)
    settings = EVERYTHING.model_copy(update={"contrast": 0, "brightness": 0, "noise": 0})
    after = augment(with_volumes(batch, sMRI=volume, fMRI=volume[..., None].expand(4, 4, 4, 3)), settings)
    alone, series = (after.pixel_values[name].voxels[0] for name in ("sMRI", "fMRI"))
    assert not torch.equal(alone, volume.half())
    assert all(torch.equal(series[..., frame], alone) for frame in range(3))


# Intensity


def test_contrast_stretches_around_the_mean_and_brightness_adds_deviations(batch: Batch) -> None:
    series = torch.tensor([1.0, 5.0]).repeat(2, 2, 2, 1)  # mean 3, deviation 2, over both frames
    settings = AugmentSettings(contrast=0.5, brightness=0.25)
    drawn = draw_intensity(RNG_KEYS[0], 0, settings)
    low, high = (3 + sign * 2 * drawn.contrast + 2 * drawn.brightness for sign in (-1, 1))
    after = augment(with_volumes(batch, fMRI=series), settings).pixel_values["fMRI"].voxels[0].float()
    torch.testing.assert_close(after, torch.tensor([low, high]).repeat(2, 2, 2, 1), rtol=2e-3, atol=2e-3)


def test_draws_of_intensity_reach_their_limits_and_differ_between_volumes_of_a_sample() -> None:
    settings = AugmentSettings(contrast=0.2, brightness=0.1)
    for index in (0, 1):
        drawn = [draw_intensity((0, 0, i), index, settings) for i in range(500)]
        for values in ([(d.contrast - 1) / 0.2 for d in drawn], [d.brightness / 0.1 for d in drawn]):
            assert -1 <= min(values) < -0.95
            assert 0.95 < max(values) <= 1
    first, second = (draw_intensity((0, 0, 0), index, settings) for index in (0, 1))
    assert first.contrast != second.contrast
    assert first.brightness != second.brightness
    assert first.noise_seed != second.noise_seed


def test_noise_is_normal_as_wide_as_told_and_new_in_each_voxel_frame_and_volume(batch: Batch) -> None:
    volume = torch.tensor([-4.0, 4.0]).repeat(24, 24, 12)  # deviation 4
    before = with_volumes(batch, fMRI=volume[..., None].expand(24, 24, 24, 2), sMRI=volume)
    after = augment(before, AugmentSettings(noise=0.25)).pixel_values
    noises = [
        *(after["fMRI"].voxels[0].float() - volume[..., None]).unbind(-1),
        after["sMRI"].voxels[0].float() - volume,
    ]
    table = torch.stack([noise.flatten() for noise in noises])  # 3 x 13824
    torch.testing.assert_close(table.mean(1), torch.zeros(3), rtol=0, atol=0.04)
    torch.testing.assert_close(table.std(1), torch.ones(3), rtol=0, atol=0.04)
    torch.testing.assert_close((table.abs() < 1).float().mean(1), torch.full((3,), 0.683), rtol=0, atol=0.02)
    neighbours = torch.cat([table, table[:1].roll(1, 1)])
    torch.testing.assert_close(torch.corrcoef(neighbours), torch.eye(4), rtol=0, atol=0.05)


def test_a_voxel_beyond_half_precision_becomes_its_largest_number(batch: Batch) -> None:
    volume = torch.tensor([-6e4, 6e4]).repeat(2, 2, 1)
    after = augment(with_volumes(batch, sMRI=volume), AugmentSettings(brightness=5)).pixel_values["sMRI"].voxels
    assert after.isfinite().all()
    assert after.abs().max() == torch.finfo(torch.float16).max


# What decides the numbers


@pytest.mark.parametrize("pack", [0, 10_000])
def test_a_sample_is_changed_alike_in_any_batch(batch: Batch, batch_of: Callable[..., Batch], pack: int) -> None:
    expected = augment(batch, EVERYTHING)
    assert not same(expected, batch)
    assert same(augment(batch_of(*NAMES, rng_keys=RNG_KEYS, pack=pack), EVERYTHING), expected)
    assert same(augment(batch_of(*NAMES[::-1], rng_keys=RNG_KEYS[::-1], pack=pack), EVERYTHING)[::-1], expected)
    for i, name in enumerate(NAMES):
        assert same(augment(batch_of(name, rng_keys=RNG_KEYS[i : i + 1]), EVERYTHING), expected[i])


@pytest.mark.parametrize("other", [(1, 3, 7), (0, 4, 7), (0, 3, 8)])
def test_another_seed_epoch_or_sample_has_other_draws(other: tuple[int, ...]) -> None:
    some, others = draw_geometry(RNG_KEYS[0], EVERYTHING), draw_geometry(other, EVERYTHING)
    assert not np.isclose(some.linear, others.linear).any()
    assert not np.isclose(some.shift, others.shift).any()
    assert draw_intensity(RNG_KEYS[0], 0, EVERYTHING) != draw_intensity(other, 0, EVERYTHING)


def test_one_option_leaves_the_draws_of_the_others() -> None:
    nothing, rng_key = AugmentSettings(), RNG_KEYS[0]
    for name, value in EVERYTHING:
        alone = nothing.model_copy(update={name: value})
        parts = [(draw_geometry(rng_key, s), draw_intensity(rng_key, 0, s)) for s in (alone, EVERYTHING)]
        (some, some_values), (all_, all_values) = parts
        assert some_values.noise_seed == all_values.noise_seed
        assert {
            "flip_left_right": some.mirror[0] == all_.mirror[0],
            "flip_other": (some.mirror[1:] == all_.mirror[1:]).all(),
            "rotate": np.allclose(some.linear, all_.linear / np.cbrt(np.linalg.det(all_.linear))),
            "scale": np.isclose(np.linalg.det(some.linear), np.linalg.det(all_.linear)),
            "shift": (some.shift == all_.shift).all(),
            "contrast": some_values.contrast == all_values.contrast,
            "brightness": some_values.brightness == all_values.brightness,
            "noise": True,
        }[name]


@pytest.mark.parametrize("rng_key", [(0, 0, 0), (5, 2, 1), (2**40, 2, 1)])
def test_no_generator_is_one_that_picks_windows_or_orders_samples(rng_key: tuple[int, ...]) -> None:
    taken = [rng_key[:2], (*rng_key[:2], 1), *((*rng_key, index) for index in range(20))]
    first = {np.random.default_rng(key).random() for key in taken}
    own = {_generator(rng_key, number).random() for number in range(20)}
    assert len(own) == 20
    assert not own & first


# What a batch carries


def test_draws_stay_with_their_samples(batch: Batch) -> None:
    assert batch.to("cpu").rng_keys == RNG_KEYS
    assert "rng_keys" not in batch.model_inputs()
    assert batch[1].rng_keys == RNG_KEYS[1:2]
    assert batch[::-1].rng_keys == RNG_KEYS[::-1]
    assert batch[3:].rng_keys == ()
    changed = augment(batch, EVERYTHING)
    assert (changed.rng_keys, changed.task_ids) == (RNG_KEYS, NAMES)
    assert changed.input_ids is batch.input_ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_changes_volumes_as_a_cpu_does_but_for_noise_of_its_own(batch: Batch) -> None:
    quiet = EVERYTHING.model_copy(update={"noise": 0})
    there = augment(batch.to("cuda"), quiet)
    for run, voxels in by_run(augment(batch, quiet)).items():
        torch.testing.assert_close(by_run(there)[run].cpu(), voxels, rtol=0, atol=5e-3)
        assert by_run(there)[run].is_cuda
    noisy = augment(batch.to("cuda"), EVERYTHING)
    assert not same(noisy, there)
    for i in range(3):
        assert same(augment(batch[i].to("cuda"), EVERYTHING), noisy[i])


def test_a_volume_that_stands_alone_is_changed_as_the_only_one_of_a_sample(batch: Batch) -> None:
    batch = with_volumes(batch, sMRI=random(6, 7, 8))
    batch = replace(batch, num_images_per_sample=torch.tensor([1]))
    batch = replace(batch, pixel_values={"sMRI": replace(batch.pixel_values["sMRI"], run=torch.tensor([0]))})
    voxels = batch.pixel_values["sMRI"].voxels
    alone = augment_volumes(voxels[:, None].float(), batch.rng_keys, EVERYTHING)
    assert torch.equal(alone[:, 0].half(), augment(batch, EVERYTHING).pixel_values["sMRI"].voxels)
    assert not torch.equal(alone[:, 0].half(), voxels)
