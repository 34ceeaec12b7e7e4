"""Volumes that the nodes of a cluster decode."""

from pathlib import Path

import pytest

from umbrella.file_storage import FileStorage
from umbrella.modality import Modality
from umbrella.volumes import store as store_module
from umbrella.volumes.store import VolumeStore, decode_volumes

CUBE = Modality(grid=(4, 4, 4), patch=(2, 2, 2))

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def test_nodes_decode_to_the_same_arrays_and_reasons_as_one_process(
    tmp_path: Path, stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.nii").write_bytes(b"no volume")
    bad = [(str(tmp_path / name), "sMRI") for name in ("broken.nii", "missing.nii")]
    volumes = [(str(path), "sMRI") for path in stored.values()] + bad
    here, there = (VolumeStore(tmp_path / name, {"sMRI": CUBE}, 10_000) for name in ("here", "there"))
    reasons = decode_volumes(here, volumes, 1, lambda things, what: things)
    assert sorted(reasons) == bad
    monkeypatch.setattr(store_module, "MIN_PARALLEL_BYTES", -1)
    monkeypatch.setattr(store_module, "has_several_nodes", lambda: True)
    assert decode_volumes(there, volumes, 2, lambda things, what: things) == reasons
    made = [{file.name for file in (tmp_path / name).rglob("*.npy")} for name in ("here", "there")]
    assert made[0] == made[1]
    unreachable = VolumeStore(tmp_path / "store", {"sMRI": CUBE}, 10_000, FileStorage("nosuch://bucket"))
    with pytest.raises(OSError, match=r"resources\.store=nosuch://bucket: "):  # no fault of a volume
        list(store_module._decode_on_nodes(unreachable, [volumes], 0))
