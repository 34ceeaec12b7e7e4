"""The store: each volume is decoded once, is found whole or not at all, and never outlives its source."""

import json
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
import pytest

from umbrella.base import UserError
from umbrella.modality import Modality
from umbrella.volumes import store as store_module
from umbrella.volumes.preprocessing import prepare
from umbrella.volumes.reading import RawVolume, content_hash
from umbrella.volumes.store import VolumeStore
from umbrella.volumes.store_files import prune, stored_recipes

LIMIT = 2**31
SMALL = {
    "sMRI": Modality(grid=(4, 4, 4), patch=(2, 2, 2)),
    "fMRI": Modality(grid=(2, 2, 2, 4), patch=(1, 1, 1, 1)),
}


def save(path: Path, voxels: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return path


def open_store(folder: Path, **modalities: Modality) -> VolumeStore:
    return VolumeStore(folder / "store", SMALL | modalities, LIMIT)


def arrays(folder: Path) -> list[Path]:
    return sorted((folder / "store").rglob("*.npy"))


def test_a_volume_is_decoded_once_and_handed_out_as_a_read_only_map(tmp_path: Path, brain: np.ndarray) -> None:
    path = save(tmp_path / "s.nii", brain)
    assert not open_store(tmp_path).contains(path, "sMRI")
    first = open_store(tmp_path).get(path, "sMRI")
    [made] = arrays(tmp_path)
    os.utime(made, ns=(1, 1))
    again = open_store(tmp_path).get(path, "sMRI")
    assert open_store(tmp_path).contains(path, "sMRI")
    assert made.stat().st_mtime_ns == 1
    assert isinstance(again, np.memmap)
    assert not again.flags.writeable
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(again, prepare(RawVolume(brain, 1, 0, np.eye(4)), SMALL["sMRI"]))
    assert not list(tmp_path.rglob("*.partial"))


def test_reading_gives_what_the_map_has_and_of_a_series_one_window(tmp_path: Path, brain: np.ndarray) -> None:
    path, long = save(tmp_path / "s.nii", brain), tmp_path / "f.nii"
    save(long, np.random.default_rng(0).normal(size=(3, 3, 3, 9)))
    skipping = Modality(grid=(2, 2, 2, 3), patch=(1, 1, 1, 1), frame_stride=2)  # spans 5 of 9 frames, from 0 to 4
    store = open_store(tmp_path, fMRI=skipping)
    into = np.empty((4, 4, 4), np.float16)
    store.read(path, "sMRI", into)
    np.testing.assert_array_equal(into, store.get(path, "sMRI"))
    frames = np.empty((3, 2, 2, 2), np.float16)
    store.read(long, "fMRI", frames)
    np.testing.assert_array_equal(frames, store.get(long, "fMRI")[2:7:2])
    seen = set()
    for epoch in range(40):
        store.read(long, "fMRI", frames, (0, epoch))
        [start] = [s for s in range(5) if np.array_equal(frames, store.get(long, "fMRI")[s : s + 5 : 2])]
        seen.add(start)
    assert seen == set(range(5))


def test_arrays_are_read_without_pythons_parser_which_fails_now_and_then_among_threads(
    tmp_path: Path, brain: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "s.nii", brain)
    made = np.array(open_store(tmp_path).get(path, "sMRI"))
    np.testing.assert_array_equal(made, np.load(arrays(tmp_path)[0]))
    monkeypatch.setattr("ast.parse", lambda *unused, **options: pytest.fail("parsed"))
    into = np.empty((4, 4, 4), np.float16)
    open_store(tmp_path).read(path, "sMRI", into)
    np.testing.assert_array_equal(into, made)
    np.testing.assert_array_equal(open_store(tmp_path).get(path, "sMRI"), made)


@pytest.mark.parametrize("size", [0, 50, 200])
def test_reading_an_array_that_was_cut_short_makes_it_again(tmp_path: Path, brain: np.ndarray, size: int) -> None:
    path = save(tmp_path / "s.nii", brain)
    whole = np.array(open_store(tmp_path).get(path, "sMRI"))
    os.truncate(arrays(tmp_path)[0], size)
    into = np.empty((4, 4, 4), np.float16)
    open_store(tmp_path).read(path, "sMRI", into)
    np.testing.assert_array_equal(into, whole)


def test_equal_content_under_two_names_is_one_array(
    tmp_path: Path, brain: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "s.nii", brain)
    shutil.copy(path, tmp_path / "copy.nii")
    store = open_store(tmp_path)
    store.get(path, "sMRI")
    monkeypatch.setattr(store_module, "read_volume", None)  # decoding again would fail
    np.testing.assert_array_equal(store.get(tmp_path / "copy.nii", "sMRI"), store.get(path, "sMRI"))
    assert len(arrays(tmp_path)) == 1


def test_a_changed_source_and_another_recipe_are_other_arrays(tmp_path: Path, brain: np.ndarray) -> None:
    path = save(tmp_path / "s.nii", brain)
    store = open_store(tmp_path)
    before = np.array(store.get(path, "sMRI"))
    other = open_store(tmp_path, sMRI=Modality(grid=(8, 4, 4), patch=(2, 2, 2)))
    assert other.get(path, "sMRI").shape == (8, 4, 4)
    save(path, brain[::-1])
    os.utime(path, ns=(1, 1))  # of the same size
    assert not store.contains(path, "sMRI")
    np.testing.assert_allclose(store.get(path, "sMRI"), before[::-1], atol=2e-3)
    assert len(arrays(tmp_path)) == 3


def test_the_second_file_of_a_pair_makes_its_array_stale(tmp_path: Path, brain: np.ndarray) -> None:
    nib.save(nib.Nifti1Pair(brain, np.eye(4)), tmp_path / "s.img")
    store = open_store(tmp_path)
    before = np.array(store.get(tmp_path / "s.hdr", "sMRI"))
    voxels = np.fromfile(tmp_path / "s.img", np.float32)
    (-voxels).tofile(tmp_path / "s.img")
    os.utime(tmp_path / "s.img", ns=(10**17, 10**17))  # as from a copy that keeps times, older than the header
    np.testing.assert_allclose(store.get(tmp_path / "s.hdr", "sMRI"), -before, atol=2e-3)


def test_an_analyze_pair_without_an_affine_of_its_own_is_kept(tmp_path: Path, brain: np.ndarray) -> None:
    nib.save(nib.AnalyzeImage(brain, np.diag([-1, 1, 1, 1])), tmp_path / "old.img")
    assert open_store(tmp_path).get(tmp_path / "old.hdr", "sMRI").shape == (4, 4, 4)


@pytest.mark.parametrize("size", [0, 50, 200])
def test_an_array_that_was_cut_short_is_made_again(tmp_path: Path, brain: np.ndarray, size: int) -> None:
    path = save(tmp_path / "s.nii", brain)
    whole = np.array(open_store(tmp_path).get(path, "sMRI"))
    [made] = arrays(tmp_path)
    os.truncate(made, size)
    assert not open_store(tmp_path).contains(path, "sMRI")
    np.testing.assert_array_equal(open_store(tmp_path).get(path, "sMRI"), whole)


def test_a_series_keeps_every_frame_and_serves_windows_of_any_length_that_fits(tmp_path: Path) -> None:
    path = save(tmp_path / "f.nii", np.random.default_rng(0).normal(size=(3, 3, 3, 6)))
    assert open_store(tmp_path).get(path, "fMRI").shape == (6, 2, 2, 2)
    longer = open_store(tmp_path, fMRI=Modality(grid=(2, 2, 2, 6), patch=(1, 1, 1, 1)))
    assert longer.contains(path, "fMRI")
    too_long = open_store(tmp_path, fMRI=Modality(grid=(2, 2, 2, 7), patch=(1, 1, 1, 1)))
    assert not too_long.contains(path, "fMRI")
    with pytest.raises(UserError, match=r"f\.nii: has 6 frames, and a window of 7 frames"):
        too_long.get(path, "fMRI")


def test_what_was_seen_of_a_volume_is_kept_beside_its_array(tmp_path: Path) -> None:
    voxels = np.zeros((4, 4, 4), np.int16)
    voxels[:2] = np.array([10, 30], np.int16)[:, None, None]
    nib.save(nib.Nifti1Image(voxels, np.diag([-2, 1, 1.5, 1])), tmp_path / "s.nii.gz")
    store = open_store(tmp_path)
    store.get(tmp_path / "s.nii.gz", "sMRI")
    facts = store.info(tmp_path / "s.nii.gz", "sMRI")
    assert (facts.shape, facts.spacing, facts.orientation, facts.dtype) == ((4, 4, 4), (2, 1, 1.5), "LAS", "int16")
    assert (facts.minimum, facts.maximum, facts.mean, facts.foreground) == (0, 30, 10, 0.5)
    assert facts.deviation == pytest.approx(np.std([0, 0, 10, 30]))


def test_a_store_of_an_older_version_keeps_all_arrays_but_those_that_are_read_otherwise_now(
    tmp_path: Path, brain: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, micron = save(tmp_path / "usual.nii", brain), tmp_path / "micron.nii"
    image = nib.Nifti1Image(brain, np.diag([2000, 2000, 2000, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, micron)
    made = {}
    for path in (usual, micron):
        open_store(tmp_path).get(path, "sMRI")
        made[path] = open_store(tmp_path).path(path, "sMRI")
        # Older records have no notes, and name an array by the content of the file alone.
        [record] = [r for r in (tmp_path / "store/sources").iterdir() if str(path) in r.read_text()]
        older = json.loads(record.read_text())
        older["content"] = content_hash(path)
        del older["notes"]
        record.write_text(json.dumps(older))
    made[micron].rename(made[micron].with_stem(content_hash(micron)))
    store = open_store(tmp_path)
    assert store.get(micron, "sMRI").shape == (4, 4, 4)
    assert made[micron].exists()
    assert store.notes(micron) == ("the unit in the header is micrometres, converted to millimetres",)
    monkeypatch.setattr(store_module, "read_volume", None)  # neither decoded nor read again
    monkeypatch.setattr(store_module, "content_hash", None)
    store.get(usual, "sMRI")
    assert (store.path(usual, "sMRI"), store.notes(usual)) == (made[usual], ())
    assert open_store(tmp_path).contains(usual, "sMRI")


def fill(folder: Path, paths: list[Path]) -> list[bytes]:
    store = open_store(folder)
    return [store.get(path, "sMRI").tobytes() for path in paths]


def test_many_processes_fill_one_store_at_once(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    paths = [save(tmp_path / f"{i}.nii.gz", draw.normal(size=(9, 8, 7))) for i in range(6)]
    with ProcessPoolExecutor(3, get_context("spawn")) as processes:
        first, *others = processes.map(fill, [tmp_path] * 3, [paths] * 3)
    assert all(other == first for other in others)
    assert len(arrays(tmp_path)) == 6
    assert not list(tmp_path.rglob("*.partial"))


def test_the_umask_says_who_may_read_an_array(tmp_path: Path, brain: np.ndarray) -> None:
    before = os.umask(0o027)
    try:
        open_store(tmp_path).get(save(tmp_path / "s.nii", brain), "sMRI")
    finally:
        os.umask(before)
    [made] = arrays(tmp_path)
    assert made.stat().st_mode & 0o777 == 0o640


def test_an_array_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, brain: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(file: BinaryIO, array: np.ndarray) -> None:
        file.write(array.tobytes()[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        open_store(tmp_path).get(save(tmp_path / "s.nii", brain), "sMRI")
    assert not arrays(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_volume_that_cannot_be_used_leaves_no_array(tmp_path: Path, brain: np.ndarray) -> None:
    store = open_store(tmp_path)
    with pytest.raises(UserError, match=r"s\.nii: every voxel is 0"):
        store.get(save(tmp_path / "s.nii", 0 * brain), "sMRI")
    with pytest.raises(UserError, match=r"none\.nii: No such file or directory; see data\.root and data\.path_map"):
        store.get(tmp_path / "none.nii", "sMRI")
    assert not arrays(tmp_path)


def test_pruning_keeps_what_can_still_be_asked_for_and_nothing_else(tmp_path: Path, brain: np.ndarray) -> None:
    paths = [save(tmp_path / f"{i}.nii", brain + i * brain**2) for i in range(3)]
    for path in paths:
        open_store(tmp_path).get(path, "sMRI")
    open_store(tmp_path, sMRI=Modality(grid=(8, 4, 4), patch=(2, 2, 2))).get(paths[0], "sMRI")
    paths[1].unlink()
    left = [tmp_path / "store" / f".{age}.npy.0.partial" for age in ("old", "new")]
    for file in left:
        file.write_bytes(b"half")
    os.utime(left[0], (0, time.time() - 2 * 24 * 3600))

    old, now = sorted(stored_recipes(tmp_path / "store", SMALL), key=lambda holding: holding.arrays)
    assert [(h.arrays, h.modalities) for h in (old, now)] == [(1, ()), (3, ("sMRI",))]
    assert now.size == sum(file.stat().st_size for file in now.folder.glob("*.npy"))
    assert old.recipe["grid"] == [8, 4, 4]

    files, size = prune(tmp_path / "store", SMALL)
    # The old recipe's array, facts and description; the array, facts and record of the deleted source; the leftover.
    assert files == 7
    assert size > 0
    assert len(arrays(tmp_path)) == 2
    assert [file.exists() for file in left] == [False, True]
    assert open_store(tmp_path).contains(paths[0], "sMRI")
    records = [json.loads(record.read_text())["path"] for record in (tmp_path / "store/sources").iterdir()]
    assert sorted(records) == [str(paths[0]), str(paths[2])]
    assert prune(tmp_path / "store", SMALL) == (0, 0)
