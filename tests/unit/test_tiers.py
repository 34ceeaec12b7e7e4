"""A store of a node's own in front of one that all share: a volume is decoded once, fetched once, and always whole."""

import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import nibabel as nib
import numpy as np
import pytest

from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.data.ingest import open_store, shared_folders
from umbrella.file_storage import FileStorage
from umbrella.modality import Modality
from umbrella.volumes import store as rooms
from umbrella.volumes.store import VolumeStore

MODALITIES = {"sMRI": Modality(grid=(4, 4, 4), patch=(2, 2, 2))}


@pytest.fixture(params=["path", "file", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a shared store that is empty."""
    places = {"path": f"{tmp_path}/shared", "file": f"file://{tmp_path}/shared", "memory": f"memory://{uuid4().hex}"}
    return places[request.param]


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "scan.nii")
    return tmp_path / "scan.nii"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is decoded while a test runs."""
    seen: list[str] = []
    decode = rooms.decode
    monkeypatch.setattr(rooms, "decode", lambda source, *others: (seen.append(str(source)), decode(source, *others))[1])
    return seen


@pytest.fixture
def node(tmp_path: Path, address: str) -> Callable[[str], VolumeStore]:
    """The store of a node of this name, in front of the shared one."""
    return lambda name: VolumeStore(tmp_path / name, MODALITIES, 10_000, FileStorage(address))


def test_what_one_node_decodes_another_one_fetches_and_reads_the_same(
    node: Callable[[str], VolumeStore], scan: Path, decoded: list[str], tmp_path: Path
) -> None:
    one, two = node("one"), node("two")
    assert not one.contains(scan, "sMRI")
    first = one.get(scan, "sMRI")
    assert two.contains(scan, "sMRI")
    assert not list((tmp_path / "two").rglob("*.npy")), "looking fetches nothing"
    into = np.empty((4, 4, 4), np.float16)
    two.read(scan, "sMRI", into)
    assert np.array_equal(into, first)
    assert two.info(scan, "sMRI") == one.info(scan, "sMRI")
    assert decoded == [str(scan)]
    assert len(list((tmp_path / "two").rglob("*.npy"))) == 1, "it lies on the node now"


def test_an_array_that_was_cut_short_behind_is_made_again_for_all(
    node: Callable[[str], VolumeStore], scan: Path, decoded: list[str], tmp_path: Path
) -> None:
    one = node("one")
    whole = np.array(one.get(scan, "sMRI"))
    array = one.path(scan, "sMRI")
    array.write_bytes(array.read_bytes()[:-1])
    one.shared.upload(array.relative_to(one.folder).as_posix(), array)
    assert np.array_equal(node("two").get(scan, "sMRI"), whole)
    assert np.array_equal(node("three").get(scan, "sMRI"), whole)
    assert len(decoded) == 2, "the third node has fetched what the second one made"


def test_many_that_fetch_and_put_at_once_find_whole_files(
    node: Callable[[str], VolumeStore], scan: Path, tmp_path: Path
) -> None:
    def get(number: int) -> np.ndarray:
        return np.array(node(f"node-{number % 3}").get(scan, "sMRI"))

    with ThreadPoolExecutor(8) as pool:
        arrays = list(pool.map(get, range(24)))
    assert all(np.array_equal(array, arrays[0]) for array in arrays)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_source_that_changed_is_decoded_anew_although_the_old_one_lies_behind(
    node: Callable[[str], VolumeStore], scan: Path, decoded: list[str]
) -> None:
    before = np.array(node("one").get(scan, "sMRI"))
    nib.save(nib.Nifti1Image(np.arange(27, dtype=np.float32).reshape(3, 3, 3), np.eye(4)), scan)
    os.utime(scan, (1, 1))
    assert not np.array_equal(node("two").get(scan, "sMRI"), before)
    assert len(decoded) == 2


def test_a_store_that_travels_makes_its_folder_where_it_arrives(
    node: Callable[[str], VolumeStore], scan: Path, tmp_path: Path
) -> None:
    packed = pickle.dumps(node("one"))
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    assert pickle.loads(packed).get(scan, "sMRI").shape == (4, 4, 4)


def test_a_store_that_cannot_be_reached_says_its_address_without_its_secrets_and_blames_no_volume(
    scan: Path, tmp_path: Path
) -> None:
    behind = FileStorage("nosuch://user:secret@bucket/volumes")
    store = VolumeStore(tmp_path / "one", MODALITIES, 10_000, behind)
    with pytest.raises(OSError, match=r"resources.store=nosuch://\*\*\*@bucket/volumes: ") as raised:
        store.get(scan, "sMRI")
    assert "secret" not in str(raised.value)
    assert not isinstance(raised.value, UserError)


def test_settings_say_which_store_lies_where(tmp_path: Path) -> None:
    def opened(**places: str) -> tuple[str, str | None]:
        settings = load_settings(
            overrides={"resources.storage": str(tmp_path), **{f"resources.{k}": v for k, v in places.items()}}
        )
        store = open_store(settings)
        assert all(folder.is_dir() for folder in shared_folders(settings).values())
        return str(store.folder.relative_to(tmp_path)), store.shared and store.shared.address

    shared, own = str(tmp_path / "shared"), str(tmp_path / "own")
    assert opened() == ("volumes", None)
    assert opened(store=shared) == opened(store=f"file://{shared}") == ("shared", None)
    assert opened(node_store=own) == ("own", str(tmp_path / "volumes"))
    (tmp_path / "shared").mkdir(exist_ok=True)
    assert opened(store=shared, node_store=own) == ("own", shared)
    assert opened(store="memory://x") == ("volumes", "memory://x")
    assert opened(store="memory://x", node_store=own) == ("own", "memory://x")
