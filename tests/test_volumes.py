"""Volumes: any stored form of a brain becomes one RAS+ array, prepared to the modality's grid and kept on disk once."""

import os
import struct
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
import pytest

from umbrella.base import UserError
from umbrella.modality import Modality
from umbrella.volumes.preparing import prepare
from umbrella.volumes.reading import read_volume
from umbrella.volumes.store import VolumeStore

LIMIT = 2**31
SMALL = {"sMRI": Modality(grid=(4, 4, 4), patch=(2, 2, 2))}


def save(path: Path, voxels: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return path


def refusal(path: Path, axes: int = 3) -> str:
    with pytest.raises(UserError) as caught:
        read_volume(path, axes, LIMIT)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_the_same_brain_reads_the_same_however_it_is_stored(stored: dict[str, Path], brain: np.ndarray) -> None:
    assert (stored["big_endian"].read_bytes()[:4], nib.load(stored["permuted"]).shape) == (b"\0\0\x01\x5c", (4, 7, 5))
    assert nib.load(stored["scaled"]).dataobj.slope == 0.5
    for name, path in stored.items():
        voxels = read_volume(path, 3, LIMIT)
        assert voxels.dtype == np.float32, name
        np.testing.assert_array_equal(voxels, brain, err_msg=name)


def test_a_series_is_turned_in_space_and_keeps_its_frames_in_order(tmp_path: Path) -> None:
    series = np.random.default_rng(0).normal(size=(5, 4, 3, 6)).astype(np.float32)
    nib.save(nib.Nifti1Image(series[::-1], np.diag([-1, 1, 1, 1])), tmp_path / "f.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "f.nii.gz", 4, LIMIT), series)


def test_a_fourth_axis_of_length_one_is_no_series(tmp_path: Path, brain: np.ndarray) -> None:
    path = save(tmp_path / "one.nii", brain[..., None])
    np.testing.assert_array_equal(read_volume(path, 3, LIMIT), brain)


def test_the_wrong_number_of_axes_names_the_file(tmp_path: Path, brain: np.ndarray) -> None:
    assert refusal(save(tmp_path / "s.nii", brain), axes=4) == "has 3 axes (7, 5, 4), and its modality's grid has 4"
    series = save(tmp_path / "f.nii", np.stack([brain, brain], axis=-1))
    assert refusal(series) == "has 4 axes (7, 5, 4, 2), and its modality's grid has 3"


@pytest.mark.parametrize(("size", "message"), [(32_000, "more than data.max_voxels=2147483648"), (0, "which is none")])
def test_a_header_with_absurd_sizes_is_refused_before_decoding(
    tmp_path: Path, brain: np.ndarray, size: int, message: str
) -> None:
    path = save(tmp_path / "s.nii", brain)
    raw = bytearray(path.read_bytes())
    raw[40:48] = struct.pack("<4h", 3, size, size, size)  # the header's dim
    path.write_bytes(raw)
    assert refusal(path) == f"the header claims ({size}, {size}, {size}) voxels, {message}"


def test_a_damaged_file_names_itself(tmp_path: Path) -> None:
    path = save(tmp_path / "s.nii.gz", np.random.default_rng(0).normal(size=(16, 16, 16)))
    path.write_bytes(path.read_bytes()[:9000])
    assert refusal(path).startswith("cannot be read as an image: ")
    path.write_bytes(b"not gzip at all")
    assert refusal(path).startswith("cannot be read as an image: ")
    path.unlink()
    assert refusal(path).startswith("cannot be read as an image: FileNotFoundError")


def test_voxels_that_mean_nothing_are_refused(tmp_path: Path, brain: np.ndarray) -> None:
    assert refusal(save(tmp_path / "constant.nii", np.full_like(brain, 7))) == "every voxel is 7"
    brain[0, 0, 0], brain[1, 1, 1] = np.nan, np.inf
    assert refusal(save(tmp_path / "nan.nii", brain)) == "holds 2 voxels that are NaN or infinite"


@pytest.mark.parametrize("grid", [(4, 4, 4), (16, 16, 16), (14, 3, 4)])
def test_preparing_gives_the_grid_in_half_precision_with_mean_0_and_deviation_1(brain: np.ndarray, grid: tuple) -> None:
    array = prepare(1000 + brain, Modality(grid=grid, patch=(1, 1, 1)))
    assert (array.dtype, array.shape) == (np.float16, grid)
    assert abs(array.mean(dtype=np.float64)) < 1e-3
    assert abs(array.std(dtype=np.float64, ddof=1) - 1) < 1e-3


def test_an_axis_that_shrinks_is_averaged_over() -> None:
    voxels = np.zeros((8, 2, 2), dtype=np.float32)
    voxels[:, 0, 0] = [0, 8, 2, 2, 0, 0, 1, 3]  # means of four along X: 3 and 1; of the middle two: 5 and 0.5
    array = prepare(voxels, Modality(grid=(2, 2, 2), patch=(1, 1, 1)))
    rest = array[0, 1, 1]
    np.testing.assert_allclose((array[:, 0, 0] - rest) / (array[1, 0, 0] - rest), [3, 1], atol=5e-3)


def test_a_series_keeps_its_first_frames_unmixed() -> None:
    frames = np.array([5, -3, 2, 11, 100], dtype=np.float32)
    series = np.broadcast_to(frames, (3, 3, 3, 5)).copy()
    array = prepare(series, Modality(grid=(2, 4, 2, 4), patch=(1, 1, 1, 1)))
    expected = (frames[:4] - 3.75) / frames[:4].std()  # without the fifth frame the mean is 3.75
    np.testing.assert_allclose(array, np.broadcast_to(expected, (2, 4, 2, 4)), atol=0.02)


def test_a_series_with_too_few_frames_names_the_file(tmp_path: Path) -> None:
    modality = Modality(grid=(2, 2, 2, 4), patch=(1, 1, 1, 1))
    path = save(tmp_path / "f.nii", np.random.default_rng(0).normal(size=(3, 3, 3, 2)))
    with pytest.raises(UserError, match=r"f\.nii: has 2 frames, and its modality's grid \(2, 2, 2, 4\) needs 4"):
        VolumeStore(tmp_path / "store", {"fMRI": modality}, LIMIT).get(path, "fMRI")


def test_a_volume_that_is_constant_on_the_grid_is_refused_and_not_made_zeros(tmp_path: Path) -> None:
    series = np.random.default_rng(0).normal(size=(3, 3, 3, 5)).astype(np.float32)
    series[..., :4] = 1000.1  # only the frame that is dropped differs
    store = VolumeStore(tmp_path / "store", {"fMRI": Modality(grid=(2, 4, 2, 4), patch=(1, 1, 1, 1))}, LIMIT)
    path = save(tmp_path / "f.nii", series)
    with pytest.raises(UserError, match=r"f\.nii: every voxel is 1000\.1 on its modality's grid \(2, 4, 2, 4\)"):
        store.get(path, "fMRI")


def test_small_units_do_not_flatten_a_map(brain: np.ndarray) -> None:
    np.testing.assert_allclose(prepare(1e-10 * brain, SMALL["sMRI"]), prepare(brain, SMALL["sMRI"]), atol=2e-3)


def test_the_store_decodes_a_volume_once_and_hands_out_read_only_maps(tmp_path: Path, brain: np.ndarray) -> None:
    path = save(tmp_path / "s.nii", brain)
    first = VolumeStore(tmp_path / "store", SMALL, LIMIT).get(path, "sMRI")
    [made] = (tmp_path / "store").iterdir()  # one array, and no .partial beside it
    os.utime(made, ns=(1, 1))
    again = VolumeStore(tmp_path / "store", SMALL, LIMIT).get(path, "sMRI")
    assert made.stat().st_mtime_ns == 1
    assert isinstance(again, np.memmap)
    assert not again.flags.writeable
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(again, prepare(brain, SMALL["sMRI"]))


def test_the_umask_says_who_may_read_an_array(tmp_path: Path, brain: np.ndarray) -> None:
    before = os.umask(0o027)
    try:
        VolumeStore(tmp_path / "store", SMALL, LIMIT).get(save(tmp_path / "s.nii", brain), "sMRI")
    finally:
        os.umask(before)
    [made] = (tmp_path / "store").iterdir()
    assert made.stat().st_mode & 0o777 == 0o640


def test_an_array_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, brain: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(file: BinaryIO, array: np.ndarray) -> None:
        file.write(array.tobytes()[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        VolumeStore(tmp_path / "store", SMALL, LIMIT).get(save(tmp_path / "s.nii", brain), "sMRI")
    assert list((tmp_path / "store").iterdir()) == []


def test_a_changed_source_and_another_grid_are_other_arrays(tmp_path: Path, brain: np.ndarray) -> None:
    path = save(tmp_path / "s.nii", brain)
    before = np.array(VolumeStore(tmp_path / "store", SMALL, LIMIT).get(path, "sMRI"))
    other = {"sMRI": Modality(grid=(8, 4, 4), patch=(2, 2, 2))}
    assert VolumeStore(tmp_path / "store", other, LIMIT).get(path, "sMRI").shape == (8, 4, 4)
    save(path, brain[::-1])
    after = VolumeStore(tmp_path / "store", SMALL, LIMIT).get(path, "sMRI")
    np.testing.assert_allclose(after, before[::-1], atol=2e-3)
    assert sorted(p.suffix for p in (tmp_path / "store").iterdir()) == [".npy"] * 3


def test_a_volume_that_cannot_be_used_leaves_nothing_in_the_store(tmp_path: Path, brain: np.ndarray) -> None:
    store = VolumeStore(tmp_path / "store", SMALL, LIMIT)
    with pytest.raises(UserError, match=r"s\.nii: every voxel is 0"):
        store.get(save(tmp_path / "s.nii", 0 * brain), "sMRI")
    with pytest.raises(UserError, match=r"none\.nii: No such file"):
        store.get(tmp_path / "none.nii", "sMRI")
    assert list((tmp_path / "store").iterdir()) == []
