"""Augmentation: what is done to volumes, on which axis and in which direction, and what decides the random numbers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import ndimage
from scipy.spatial.transform import Rotation

from tests.unit.steps import Make
from umbrella.data.batching import Batch, VolumeGroup
from umbrella.training.augmentation import apply_affine, augment, augment_volumes, draw_change
from umbrella.training.settings import AugmentSettings

NAMES = ("two", "none", "three")
RNG_KEYS = ((0, 3, 7), (0, 3, 8), (0, 3, 9))
EVERYTHING = AugmentSettings(
    flip_left_right=0.5, flip_other=0.5, rotate=20, scale=0.2, shift=0.1, contrast=0.3, brightness=0.5, noise=0.1
)


@pytest.fixture
def batch(batch_of: Make) -> Batch:
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


def test_a_batch_is_returned_as_it_is_without_settings_volumes_or_keys(batch: Batch, batch_of: Make) -> None:
    assert augment(batch, AugmentSettings()) is batch
    assert augment(batch[1], EVERYTHING).pixel_values == {}
    evaluated = batch_of(*NAMES)
    assert evaluated.rng_keys == evaluated[1:].rng_keys == ()
    assert augment(evaluated, EVERYTHING) is evaluated


@pytest.mark.parametrize("name", AugmentSettings.model_fields)
def test_each_option_alone_changes_every_volume_and_not_the_batch_it_came_from(batch: Batch, name: str) -> None:
    before = {run: voxels.clone() for run, voxels in by_run(batch).items()}
    changed = by_run(augment(batch, AugmentSettings(**{name: 30 if name == "rotate" else 1 - 2**-20})))
    for run, voxels in by_run(batch).items():
        assert torch.equal(voxels, before[run])
        assert not torch.equal(voxels, changed[run])
        assert (changed[run].shape, changed[run].dtype) == (voxels.shape, torch.float16)


def test_a_value_out_of_range_is_an_error() -> None:
    for name, value in {"flip_left_right": 1.1, "rotate": 181, "scale": 1, "shift": -0.1, "contrast": 1}.items():
        with pytest.raises(ValidationError, match=name):
            AugmentSettings(**{name: value})


# Geometry


@pytest.mark.parametrize(("name", "axes"), [("flip_left_right", (0,)), ("flip_other", (1, 2))])
def test_a_flip_mirrors_its_axes_exactly(batch: Batch, name: str, axes: tuple[int, ...]) -> None:
    flipped = by_run(augment(batch, AugmentSettings(**{name: 1})))
    for run, voxels in by_run(batch).items():
        assert torch.equal(flipped[run], voxels.flip(axes))


def test_a_probability_flips_some_samples_and_leaves_the_others_exactly_as_they_are(batch: Batch) -> None:
    settings, volume = AugmentSettings(flip_left_right=0.25), by_run(batch)[0]
    seen = [by_run(augment(replace(batch, rng_keys=((0, 0, i),) * 3), settings))[0] for i in range(200)]
    flipped = sum(torch.equal(voxels, volume.flip(0)) for voxels in seen)
    assert 30 < flipped < 70
    assert sum(torch.equal(voxels, volume) for voxels in seen) == 200 - flipped


def moved(volume: torch.Tensor, linear: Any, shift: Any) -> torch.Tensor:
    return apply_affine(volume[None, None], np.asarray(linear)[None], np.asarray(shift)[None])[0, 0]


def test_a_rotation_follows_the_right_hand_rule_with_cubic_voxels() -> None:
    before, after = torch.zeros(2, 3, 5, 7)
    before[1, 3, 3] = after[0, 2, 3] = 1  # one voxel to the front of the centre, one to the left of it
    turn = Rotation.from_euler("z", 90, degrees=True).as_matrix()
    torch.testing.assert_close(moved(before, turn, np.zeros(3)), after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shift_moves_towards_right_front_and_top_and_repeats_the_border(axis: int) -> None:
    line, shape = torch.tensor([1.0, 2.0, 3.0, 5.0]), [-1 if a == axis else 1 for a in range(3)]
    shift = np.eye(3)[axis] / 4
    for sign, expected in ((1, [1.0, 1.0, 2.0, 3.0]), (-1, [2.0, 3.0, 5.0, 5.0])):
        found = moved(line.view(shape), np.eye(3), sign * shift).flatten()
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)


def test_every_frame_of_the_volumes_of_a_sample_is_flipped_and_moved_alike_as_by_scipy(batch: Batch) -> None:
    volumes = {"fMRI": random(6, 8, 10, 2), "sMRI": random(12, 7, 9)}
    before = with_volumes(batch, **volumes)
    settings = AugmentSettings(flip_left_right=0.5, flip_other=0.5, rotate=40, scale=0.3, shift=0.2)
    for sample in range(8):
        change = draw_change((0, 1, sample), 0, settings)
        after = augment(replace(before, rng_keys=((0, 1, sample),)), settings)
        for name, voxels in volumes.items():
            *sizes, frames = (*voxels.shape, 1)[:4]
            mirrored = np.flip(voxels.half().float().numpy(), np.flatnonzero(change.mirror)).reshape(*sizes, frames)
            # scipy asks where a voxel of the result comes from.
            centre, back = (np.array(sizes) - 1) / 2, np.linalg.inv(change.linear)
            offset = centre - back @ (centre + change.shift * sizes)
            found = after.pixel_values[name].voxels[0].reshape(*sizes, frames)
            for frame in range(frames):
                expected = ndimage.affine_transform(mirrored[..., frame], back, offset, order=1, mode="nearest")
                np.testing.assert_allclose(found[..., frame].float(), expected, rtol=0, atol=5e-3)


# Intensity


def test_contrast_stretches_around_the_mean_and_brightness_adds_deviations(batch: Batch) -> None:
    series = torch.tensor([1.0, 5.0]).repeat(2, 2, 2, 1)  # mean 3, deviation 2, over both frames
    settings = AugmentSettings(contrast=0.5, brightness=0.25)
    change = draw_change(RNG_KEYS[0], 0, settings)
    low, high = (3 + sign * 2 * change.contrast + 2 * change.brightness for sign in (-1, 1))
    after = augment(with_volumes(batch, fMRI=series), settings).pixel_values["fMRI"].voxels[0].float()
    torch.testing.assert_close(after, torch.tensor([low, high]).repeat(2, 2, 2, 1), rtol=2e-3, atol=2e-3)


def test_noise_is_normal_of_the_given_width_and_independent_in_each_voxel_frame_and_volume(batch: Batch) -> None:
    volume = torch.tensor([-4.0, 4.0]).repeat(24, 24, 12)  # deviation 4
    before = with_volumes(batch, fMRI=volume[..., None].expand(24, 24, 24, 2), sMRI=volume)
    after = augment(before, AugmentSettings(noise=0.25)).pixel_values
    noises = [*(after["fMRI"].voxels[0] - volume[..., None]).unbind(-1), after["sMRI"].voxels[0] - volume]
    table = torch.stack([noise.float().flatten() for noise in noises])  # 3 x 13824
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


# Random numbers


def test_draws_reach_their_limits_and_no_further() -> None:
    settings = AugmentSettings(rotate=30, scale=0.2, shift=0.1, contrast=0.2, brightness=0.1)
    drawn = [draw_change((0, 0, i), i % 2, settings) for i in range(500)]
    sizes = np.array([np.cbrt(np.linalg.det(change.linear)) for change in drawn])
    turns = [Rotation.from_matrix(change.linear / size) for change, size in zip(drawn, sizes, strict=True)]
    for values, middle, width in (
        (sizes, 1, 0.2),
        (np.stack([change.shift for change in drawn]), 0, 0.1),
        (np.stack([turn.as_euler("xyz", degrees=True) for turn in turns]), 0, 30),
        (np.array([change.contrast for change in drawn]), 1, 0.2),
        (np.array([change.brightness for change in drawn]), 0, 0.1),
    ):
        assert (np.abs(values - middle) <= width * (1 + 1e-9)).all()
        assert (values.min(0) < middle - 0.95 * width).all()
        assert (values.max(0) > middle + 0.95 * width).all()


@pytest.mark.parametrize("pack", [0, 10_000])
def test_a_sample_is_changed_alike_in_any_batch(batch: Batch, batch_of: Make, pack: int) -> None:
    expected = augment(batch, EVERYTHING)
    assert not same(expected, batch)
    assert (expected.rng_keys, expected.task_ids) == (RNG_KEYS, NAMES)
    assert same(augment(batch_of(*NAMES, rng_keys=RNG_KEYS, pack=pack), EVERYTHING), expected)
    assert same(augment(batch_of(*NAMES[::-1], rng_keys=RNG_KEYS[::-1], pack=pack), EVERYTHING)[::-1], expected)
    for i, name in enumerate(NAMES):
        assert same(augment(batch_of(name, rng_keys=RNG_KEYS[i : i + 1]), EVERYTHING), expected[i])


def test_seed_epoch_and_sample_decide_the_geometry_and_the_volume_also_the_intensity() -> None:
    one = draw_change(RNG_KEYS[0], 0, EVERYTHING)
    for key, index in (((1, 3, 7), 0), ((0, 4, 7), 0), ((0, 3, 8), 0), (RNG_KEYS[0], 1)):
        other = draw_change(key, index, EVERYTHING)
        assert np.array_equal(one.linear, other.linear) == np.array_equal(one.shift, other.shift) == (index == 1)
        assert index == 1 or not np.isclose(one.linear, other.linear).any()
        for name in ("contrast", "brightness", "noise_seed"):
            assert getattr(one, name) != getattr(other, name)


def test_one_option_does_not_change_the_draws_of_the_others() -> None:
    every = draw_change(RNG_KEYS[0], 0, EVERYTHING)
    size = np.cbrt(np.linalg.det(every.linear))
    expected = {name: {name: getattr(every, name)} for name in ("shift", "contrast", "brightness")}
    expected |= {"rotate": {"linear": every.linear / size}, "scale": {"linear": size * np.eye(3)}}
    expected |= {
        "flip_left_right": {"mirror": every.mirror & [1, 0, 0]},
        "flip_other": {"mirror": every.mirror & [0, 1, 1]},
    }
    for option, fields in expected.items():
        alone = draw_change(RNG_KEYS[0], 0, AugmentSettings(**{option: getattr(EVERYTHING, option)}))
        for name, value in {**fields, "noise_seed": every.noise_seed}.items():
            np.testing.assert_allclose(np.asarray(getattr(alone, name), float), np.asarray(value, float), atol=1e-12)


@pytest.mark.parametrize("rng_key", [(0, 0, 0), (5, 2, 1), (2**40, 2, 1)])
def test_the_random_numbers_are_not_those_that_pick_windows_or_order_samples(rng_key: tuple[int, ...]) -> None:
    taken = [rng_key[:2], (*rng_key[:2], 1), *((*rng_key, index) for index in range(20))]
    others = {round(np.random.default_rng(key).uniform(-1, 1), 12) for key in taken}
    settings = AugmentSettings(contrast=0.5)
    own = {round(2 * (draw_change(rng_key, index, settings).contrast - 1), 12) for index in range(20)}
    assert len(own) == 20
    assert not own & others


def test_keys_stay_with_their_samples(batch: Batch) -> None:
    assert batch.to("cpu").rng_keys == RNG_KEYS
    assert "rng_keys" not in batch.model_inputs()
    assert batch[1].rng_keys == RNG_KEYS[1:2]
    assert batch[::-1].rng_keys == RNG_KEYS[::-1]


def test_a_volume_of_its_own_is_changed_as_the_only_one_of_a_sample(batch: Batch) -> None:
    batch = replace(with_volumes(batch, sMRI=random(6, 7, 8)), num_images_per_sample=torch.tensor([1]))
    batch = replace(batch, pixel_values={"sMRI": replace(batch.pixel_values["sMRI"], run=torch.tensor([0]))})
    voxels = batch.pixel_values["sMRI"].voxels
    alone = augment_volumes(voxels[:, None].float(), batch.rng_keys, EVERYTHING)
    assert torch.equal(alone[:, 0].half(), augment(batch, EVERYTHING).pixel_values["sMRI"].voxels)
    assert not torch.equal(alone[:, 0].half(), voxels)


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
