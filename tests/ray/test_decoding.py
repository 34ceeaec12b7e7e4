"""Volumes that the nodes of a cluster decode."""

from pathlib import Path

import pytest

from umbrella.data.ingest import _decode_on_nodes, decode_volumes
from umbrella.file_storage import FileStorage
from umbrella.modality import Modality
from umbrella.volumes.store import VolumeStore

CUBE = Modality(grid=(4, 4, 4), patch=(2, 2, 2))

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def test_nodes_of_a_cluster_decode_to_the_same_arrays_and_reasons_as_this_machine(
    tmp_path: Path, stored: dict[str, Path]
) -> None:
    (tmp_path / "broken.nii").write_bytes(b"no volume")
    paths = [*stored.values(), tmp_path / "broken.nii", tmp_path / "missing.nii"]
    volumes = [(str(path), "sMRI") for path in paths]
    here, there = (VolumeStore(tmp_path / name, {"sMRI": CUBE}, 10_000) for name in ("here", "there"))
    reasons = list(decode_volumes(here, volumes, 1))
    assert list(_decode_on_nodes(there, volumes, 1)) == reasons
    assert [bool(reason) for reason in reasons] == [False] * len(stored) + [True, True]
    assert {file.name for file in (tmp_path / "there").rglob("*.npy")} == {
        file.name for file in (tmp_path / "here").rglob("*.npy")
    }


def test_a_store_that_a_node_cannot_write_is_no_fault_of_a_volume(tmp_path: Path, stored: dict[str, Path]) -> None:
    store = VolumeStore(tmp_path / "store", {"sMRI": CUBE}, 10_000, FileStorage("nosuch://bucket"))
    with pytest.raises(OSError, match=r"resources\.store=nosuch://bucket: "):
        list(_decode_on_nodes(store, [(str(stored["plain"]), "sMRI")], 0))
