"""The volume store: each volume is decoded once, arrays are complete, and follow their source files."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import nibabel as nib
import numpy as np
import pytest

from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.file_storage import FileStorage
from umbrella.modality import Modality
from umbrella.volumes import store as store_module
from umbrella.volumes.store import VolumeStore, decode, open_store
from umbrella.volumes.store_files import prune, stored_recipes

LIMIT = 2**31
SMALL = {
    "sMRI": Modality(grid=(4, 4, 4), patch=(2, 2, 2)),
    "fMRI": Modality(grid=(2, 2, 2, 4), patch=(1, 1, 1, 1)),
}


def save(path: Path, voxels: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return path


def store_in(folder: Path, **modalities: Modality) -> VolumeStore:
    return VolumeStore(folder / "store", SMALL | modalities, LIMIT)


def read(store: VolumeStore, path: Path) -> np.ndarray:
    into = np.empty((4, 4, 4), np.float16)
    store.read(path, "sMRI", into)
    return into


def arrays(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.npy"))


@pytest.fixture
def scan(tmp_path: Path, brain: np.ndarray) -> Path:
    return save(tmp_path / "s.nii", brain)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The volumes that are decoded during a test."""
    seen: list[str] = []
    original = store_module.read_volume
    monkeypatch.setattr(
        store_module, "read_volume", lambda path, *rest: (seen.append(str(path)), original(path, *rest))[1]
    )
    return seen


def test_a_volume_is_decoded_once_and_given_as_a_read_only_map(
    tmp_path: Path, scan: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decode(scan, SMALL["sMRI"], LIMIT)[3]
    store = store_in(tmp_path)
    assert not store.contains(scan, "sMRI")
    np.testing.assert_array_equal(store.get(scan, "sMRI"), expected)
    shutil.copy(scan, tmp_path / "copy.nii")
    # Python's parser of NumPy's headers fails now and then with several threads.
    monkeypatch.setattr("ast.parse", lambda *unused, **options: pytest.fail("parsed"))
    for path in (scan, tmp_path / "copy.nii"):
        again = store_in(tmp_path).get(path, "sMRI")
        assert isinstance(again, np.memmap)
        assert not again.flags.writeable
        np.testing.assert_array_equal(again, expected)
        np.testing.assert_array_equal(read(store_in(tmp_path), path), expected)
        assert store_in(tmp_path).contains(path, "sMRI")
    assert len(decoded) == 2  # here and by the store
    [made] = arrays(tmp_path)
    monkeypatch.undo()
    np.testing.assert_array_equal(np.load(made), expected)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_series_keeps_all_frames_and_is_read_by_windows(tmp_path: Path) -> None:
    series = save(tmp_path / "f.nii", np.random.default_rng(0).normal(size=(3, 3, 3, 9)))
    skipping = Modality(grid=(2, 2, 2, 3), patch=(1, 1, 1, 1), frame_stride=2)  # 5 of 9 frames, from 0 to 4
    store = store_in(tmp_path, fMRI=skipping)
    whole = store.get(series, "fMRI")
    assert whole.shape == (9, 2, 2, 2)
    frames = np.empty((3, 2, 2, 2), np.float16)
    store.read(series, "fMRI", frames)
    np.testing.assert_array_equal(frames, whole[2:7:2])
    for epoch in range(10):
        store.read(series, "fMRI", frames, (0, epoch))
        np.testing.assert_array_equal(frames, whole[skipping.pick_window(9, (0, epoch))])
    assert store_in(tmp_path, fMRI=Modality(grid=(2, 2, 2, 9), patch=(1, 1, 1, 1))).contains(series, "fMRI")
    too_long = store_in(tmp_path, fMRI=Modality(grid=(2, 2, 2, 10), patch=(1, 1, 1, 1)))
    assert not too_long.contains(series, "fMRI")
    with pytest.raises(UserError, match=r"f\.nii: has 9 frames, and a window of 10 frames"):
        too_long.get(series, "fMRI")


@pytest.mark.parametrize("size", [0, 50, 200])
def test_truncated_arrays_are_decoded_again(tmp_path: Path, scan: Path, size: int) -> None:
    whole = np.array(store_in(tmp_path).get(scan, "sMRI"))
    for again in (read, lambda store, path: store.get(path, "sMRI")):
        os.truncate(arrays(tmp_path)[0], size)
        assert not store_in(tmp_path).contains(scan, "sMRI")
        np.testing.assert_array_equal(again(store_in(tmp_path), scan), whole)


def test_a_changed_source_and_another_recipe_are_other_arrays(tmp_path: Path, scan: Path, brain: np.ndarray) -> None:
    store = store_in(tmp_path)
    before = np.array(store.get(scan, "sMRI"))
    other = store_in(tmp_path, sMRI=Modality(grid=(8, 4, 4), patch=(2, 2, 2)))
    assert other.get(scan, "sMRI").shape == (8, 4, 4)
    save(scan, brain[::-1])
    os.utime(scan, ns=(1, 1))  # of the same size
    assert not store.contains(scan, "sMRI")
    np.testing.assert_allclose(store.get(scan, "sMRI"), before[::-1], atol=2e-3)
    assert len(arrays(tmp_path)) == 3


def test_the_second_file_of_a_pair_makes_its_array_stale(tmp_path: Path, brain: np.ndarray) -> None:
    nib.save(nib.Nifti1Pair(brain, np.eye(4)), tmp_path / "s.img")
    store = store_in(tmp_path)
    before = np.array(store.get(tmp_path / "s.hdr", "sMRI"))
    voxels = np.fromfile(tmp_path / "s.img", np.float32)
    (-voxels).tofile(tmp_path / "s.img")
    os.utime(tmp_path / "s.img", ns=(10**17, 10**17))  # as from a copy that keeps times, older than the header
    np.testing.assert_allclose(store.get(tmp_path / "s.hdr", "sMRI"), -before, atol=2e-3)


def test_geometry_and_intensities_are_kept_beside_the_array(tmp_path: Path) -> None:
    voxels = np.zeros((4, 4, 4), np.int16)
    voxels[:2] = np.array([10, 30], np.int16)[:, None, None]
    nib.save(nib.Nifti1Image(voxels, np.diag([-2, 1, 1.5, 1])), tmp_path / "s.nii.gz")
    store = store_in(tmp_path)
    store.get(tmp_path / "s.nii.gz", "sMRI")
    info = store.info(tmp_path / "s.nii.gz", "sMRI")
    assert (info.shape, info.spacing, info.orientation, info.dtype) == ((4, 4, 4), (2, 1, 1.5), "LAS", "int16")
    assert (info.minimum, info.maximum, info.mean, info.foreground) == (0, 30, 10, 0.5)
    assert info.deviation == pytest.approx(np.std([0, 0, 10, 30]))


def test_notes_about_a_header_are_kept_and_part_of_the_arrays_name(
    tmp_path: Path, scan: Path, brain: np.ndarray
) -> None:
    image = nib.Nifti1Image(brain, np.diag([2000, 2000, 2000, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "micron.nii")
    store = store_in(tmp_path)
    assert store.notes(scan) == ()
    assert store.notes(tmp_path / "micron.nii") == ("the unit in the header is micrometres, converted to millimetres",)
    assert "-" not in store.path(scan, "sMRI").stem
    assert "-" in store.path(tmp_path / "micron.nii", "sMRI").stem


def test_the_umask_sets_the_permissions_of_an_array(tmp_path: Path, scan: Path) -> None:
    before = os.umask(0o027)
    try:
        store_in(tmp_path).get(scan, "sMRI")
    finally:
        os.umask(before)
    assert arrays(tmp_path)[0].stat().st_mode & 0o777 == 0o640


def test_errors_leave_no_array_behind(tmp_path: Path, scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(file: BinaryIO, array: np.ndarray) -> None:
        file.write(array.tobytes()[:10])
        raise OSError(28, "No space left on device")

    store = store_in(tmp_path)
    with pytest.raises(UserError, match=r"zero\.nii: every voxel is 0"):
        store.get(save(tmp_path / "zero.nii", np.zeros((3, 3, 3))), "sMRI")
    with pytest.raises(UserError, match=r"none\.nii: No such file or directory; see data\.root and data\.path_map"):
        store.get(tmp_path / "none.nii", "sMRI")
    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        store.get(scan, "sMRI")
    assert not arrays(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


def test_pruning_deletes_unused_recipes_deleted_sources_and_old_partial_files(
    tmp_path: Path, brain: np.ndarray
) -> None:
    paths = [save(tmp_path / f"{i}.nii", brain + i * brain**2) for i in range(3)]
    for path in paths:
        store_in(tmp_path).get(path, "sMRI")
    store_in(tmp_path, sMRI=Modality(grid=(8, 4, 4), patch=(2, 2, 2))).get(paths[0], "sMRI")
    paths[1].unlink()
    partial = [tmp_path / "store" / f".{age}.npy.0.partial" for age in ("old", "new")]
    for file in partial:
        file.write_bytes(b"half")
    os.utime(partial[0], (0, time.time() - 2 * 24 * 3600))

    old, now = sorted(stored_recipes(tmp_path / "store", SMALL), key=lambda stored: stored.arrays)
    assert [(r.arrays, r.modalities, r.recipe["grid"][0]) for r in (old, now)] == [(1, (), 8), (3, ("sMRI",), 4)]
    assert now.size == sum(file.stat().st_size for file in now.folder.glob("*.npy"))

    counted = prune(tmp_path / "store", SMALL, dry_run=True)
    assert counted == prune(tmp_path / "store", SMALL)
    # Array, info and description of the old recipe; array, info and record of the deleted source; the partial file.
    assert (counted[0], counted[1] > 0) == (7, True)
    assert len(arrays(tmp_path)) == 2
    assert [file.exists() for file in partial] == [False, True]
    assert store_in(tmp_path).contains(paths[0], "sMRI")
    records = [json.loads(record.read_text())["path"] for record in (tmp_path / "store/sources").iterdir()]
    assert sorted(records) == [str(paths[0]), str(paths[2])]
    assert prune(tmp_path / "store", SMALL) == (0, 0)


@pytest.fixture(params=["path", "file", "memory"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], VolumeStore]]:
    """Opens the store of a node, which caches an empty shared store."""
    shared = {"path": f"{tmp_path}/shared", "file": f"file://{tmp_path}/shared", "memory": f"memory://{uuid4().hex}"}
    return lambda name: VolumeStore(tmp_path / name, SMALL, LIMIT, FileStorage(shared[request.param]))


def test_nodes_fetch_what_another_node_has_decoded(
    node: Callable[[str], VolumeStore], scan: Path, decoded: list[str], tmp_path: Path
) -> None:
    one, two = node("one"), node("two")
    assert not one.contains(scan, "sMRI")
    first = one.get(scan, "sMRI")
    assert two.contains(scan, "sMRI")
    assert not arrays(tmp_path / "two"), "contains fetches no array"
    assert two.info(scan, "sMRI") == one.info(scan, "sMRI")
    np.testing.assert_array_equal(read(two, scan), first)
    assert len(decoded) == len(arrays(tmp_path / "two")) == 1


def test_a_truncated_shared_array_is_replaced_for_all_nodes(
    node: Callable[[str], VolumeStore], scan: Path, decoded: list[str]
) -> None:
    one = node("one")
    whole = np.array(one.get(scan, "sMRI"))
    array = one.path(scan, "sMRI")
    array.write_bytes(array.read_bytes()[:-1])
    assert one.shared
    one.shared.upload(array.relative_to(one.folder).as_posix(), array)
    for name in ("two", "three"):
        np.testing.assert_array_equal(node(name).get(scan, "sMRI"), whole)
    assert len(decoded) == 2, "the third node fetches what the second one has decoded"


def test_nodes_and_threads_that_decode_at_once_find_complete_arrays(
    node: Callable[[str], VolumeStore], scan: Path, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: np.array(node(f"node-{number % 3}").get(scan, "sMRI")), range(24)))
    assert all(np.array_equal(array, found[0]) for array in found)
    assert not list(tmp_path.rglob("*.partial"))


def test_nodes_decode_a_changed_source_again(
    node: Callable[[str], VolumeStore], scan: Path, brain: np.ndarray, decoded: list[str]
) -> None:
    before = np.array(node("one").get(scan, "sMRI"))
    save(scan, brain[:3])
    os.utime(scan, (1, 1))
    assert not np.array_equal(node("two").get(scan, "sMRI"), before)
    assert len(decoded) == 2


def test_a_pickled_store_makes_its_folder(tmp_path: Path, scan: Path) -> None:
    packed = pickle.dumps(VolumeStore(tmp_path / "one", SMALL, LIMIT, FileStorage(f"{tmp_path}/shared")))
    shutil.rmtree(tmp_path / "one")
    assert pickle.loads(packed).get(scan, "sMRI").shape == (4, 4, 4)


def test_an_unreachable_shared_store_is_no_fault_of_a_volume_and_its_secrets_are_hidden(
    tmp_path: Path, scan: Path
) -> None:
    store = VolumeStore(tmp_path / "one", SMALL, LIMIT, FileStorage("nosuch://user:secret@bucket/volumes"))
    with pytest.raises(OSError, match=r"resources.store=nosuch://\*\*\*@bucket/volumes: ") as raised:
        store.get(scan, "sMRI")
    assert "secret" not in str(raised.value)


def test_settings_choose_the_folder_and_the_shared_store(tmp_path: Path) -> None:
    def opened(**places: str) -> tuple[str, str | None]:
        values = {"resources.storage": str(tmp_path), **{f"resources.{name}": place for name, place in places.items()}}
        store = open_store(load_settings(overrides=values))
        return str(store.folder.relative_to(tmp_path)), store.shared and store.shared.address

    shared, own = str(tmp_path / "shared"), str(tmp_path / "own")
    assert opened() == ("volumes", None)
    assert opened(store=shared) == opened(store=f"file://{shared}") == ("shared", None)
    assert opened(node_store=own) == ("own", str(tmp_path / "volumes"))
    assert opened(store=shared, node_store=own) == ("own", shared)
    assert opened(store="memory://x") == ("volumes", "memory://x")
    assert opened(store="memory://x", node_store=own) == ("own", "memory://x")
