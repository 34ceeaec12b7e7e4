"""What a node is asked before a training starts, and whether it sees what all share."""

import os
import socket
import stat
from pathlib import Path

import pytest

from umbrella.base import UserError
from umbrella.fileio import lock
from umbrella.nodes import SharedFiles, check_nodes, find_problems, installed_versions
from umbrella.training.cluster import check_local_folders, check_reachable, create_token, free_port, start_lock


def test_a_node_that_sees_everything_has_no_fault(tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    (tmp_path / "scan.nii").touch()
    shared = SharedFiles({"resources.storage": tmp_path}, [tmp_path / "scan.nii"], "token")
    assert find_problems(shared, installed_versions()) == []


def test_each_fault_is_a_line_with_what_is_wrong_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    folders = {"resources.storage": tmp_path / "other", "resources.store": tmp_path / "gone"}
    found = find_problems(
        SharedFiles(folders, [tmp_path / "scan.nii", tmp_path / "gone" / "scan.nii"], "token"),
        installed_versions() | {"Python": "2.7", "torch": "0.1"},
    )
    own = installed_versions()
    assert found == [
        f"resources.storage={tmp_path}/other is another folder here; mount the same one at this path on every node",
        f"resources.store={tmp_path}/gone is not there; mount the same one at this path on every node",
        f"the volume {tmp_path}/scan.nii is not there; mount the volumes at the same path on every node",
        f"has Python {own['Python']} instead of 2.7, torch {own['torch']} instead of 0.1; install the same versions on"
        " every node",
    ]


def test_a_folder_that_can_be_seen_and_not_written_is_a_fault(tmp_path: Path) -> None:
    # Root may write anywhere but where the kernel itself says what there is.
    proc = Path("/proc")
    if not proc.is_dir():
        pytest.skip("no folder that even root cannot write to")
    (fault,) = find_problems(SharedFiles({"resources.storage": proc}, [], "version"), installed_versions())
    assert fault.startswith("resources.storage=/proc cannot be written to: ")


def test_without_a_cluster_nothing_is_asked(tmp_path: Path) -> None:
    check_nodes({"resources.storage": tmp_path / "gone"}, [tmp_path / "gone" / "scan.nii"])


def test_a_cluster_that_is_gone_is_one_line_that_names_the_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        for scheme in ("", "ray://"):
            address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(
                UserError, match=rf"^RAY_ADDRESS={address}: nothing answers there \(Connection refused\); "
            ):
                check_reachable(address, f"RAY_ADDRESS={address}")
        taken.listen()
        check_reachable(address, "")
    for address in ("auto", "127.0.0.1", "http://host"):
        check_reachable(address, "")
    with pytest.raises(UserError, match=r"^here: nothing answers there"):
        check_reachable("127.0.0.1:99999", "here")


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_that_is_no_place_for_rays_sockets_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, "/tmp")
    check_local_folders()
    for folder, message in (
        (f"{tmp_path}/{'x' * 60}", r"the path is longer than 4\d bytes, the limit for Ray's sockets; set "),
        ("/proc/none", "the folder for Ray's files cannot be written to: "),
    ):
        monkeypatch.setenv(variable, folder)
        with pytest.raises(UserError, match=f"^{variable}={folder}: {message}"):
            check_local_folders()


def test_shared_memory_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umbrella.training.cluster.SHARED_MEMORY", "/proc/self")
    with pytest.raises(UserError, match=r"^/proc/self, where Ray keeps objects, cannot be written to: "):
        check_local_folders()


def test_the_token_of_a_ray_of_our_own_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    create_token()
    made = token.read_text()
    assert len(made) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    os.chmod(token, 0o644)
    create_token()
    assert (token.read_text(), stat.S_IMODE(token.stat().st_mode)) == (made, 0o600)
    monkeypatch.setenv("HOME", "/proc/none")
    with pytest.raises(UserError, match=r"^/proc/none/\.ray, where Ray keeps its token, cannot be written to: "):
        create_token()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    create_token()


def test_the_dashboards_port_is_free_and_one_script_at_a_time_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbrella.training.cluster.gettempdir", lambda: str(tmp_path))
    with start_lock(), next(tmp_path.iterdir()).open() as file:
        assert not lock(file)
        with socket.socket() as other:
            other.bind(("127.0.0.1", free_port()))
            other.listen()
            assert free_port() != other.getsockname()[1]
    with next(tmp_path.iterdir()).open() as file:
        assert lock(file)
