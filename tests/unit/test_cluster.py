"""The Ray of a script: what is checked before it starts, whether trainings fit, and what a node must have."""

import os
import socket
import stat
from pathlib import Path

import pytest

from umbrella.base import UserError
from umbrella.cluster import (
    check_local_folders,
    check_nodes,
    check_reachable,
    create_token,
    find_problems,
    installed_versions,
    max_concurrent_trainings,
    reserve_dashboard_port,
)
from umbrella.fileio import lock
from umbrella.training.settings import ResourceSettings


@pytest.mark.parametrize(
    ("asked", "node", "at_once"),
    [
        ({}, {"CPU": 2}, 2),
        ({"cpus_per_worker": 0.75}, {"CPU": 2}, 1),
        ({"workers": 2}, {"CPU": 2}, 1),
        ({}, {"CPU": 16}, 16),
        ({"gpus_per_worker": 0.5}, {"CPU": 16, "GPU": 1}, 2),
        ({"workers": 2, "gpus_per_worker": 1, "cpus_per_worker": 4}, {"CPU": 64, "GPU": 4}, 2),
        ({"workers": 4, "min_workers": 1, "gpus_per_worker": 1}, {"CPU": 64, "GPU": 8}, 2),
        ({"workers": 4, "min_workers": 1, "gpus_per_worker": 1}, {"CPU": 64, "GPU": 2}, 1),
    ],
)
def test_concurrent_trainings_leave_a_cpu_for_ray(asked: dict, node: dict, at_once: int) -> None:
    assert max_concurrent_trainings(ResourceSettings(**asked), [node]) == at_once


def test_gpus_that_no_setting_uses_get_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    max_concurrent_trainings(ResourceSettings(), [{"CPU": 8, "GPU": 2}])
    line = "note: these settings use none of 2 GPUs; add gpu_host.yaml to the command, or resources.gpus_per_worker=1\n"
    assert capsys.readouterr().err == line
    max_concurrent_trainings(ResourceSettings(gpus_per_worker=1), [{"CPU": 8, "GPU": 2}])
    max_concurrent_trainings(ResourceSettings(), [{"CPU": 8}])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("asked", "nodes", "message"),
    [
        ({"workers": 2, "cpus_per_worker": 1}, [{"CPU": 2}], r"need 3 CPUs, and Ray has 2; lower resources\.cpus_per_"),
        ({"gpus_per_worker": 1}, [{"CPU": 8}], "1 workers of 1 GPUs need 1 GPUs, and Ray has 0"),
        (
            {"workers": 4, "min_workers": 2, "gpus_per_worker": 1},
            [{"CPU": 8, "GPU": 1}],
            "2 workers of 1 GPUs need 2 GPUs, and Ray has 1",
        ),
        (
            {"workers": 2, "cpus_per_worker": 4},
            [{"CPU": 6}, {"CPU": 3}],
            r"each on one node, and the nodes have room for 1; lower resources\.cpus_per_worker",
        ),
    ],
)
def test_a_training_that_cannot_start_is_an_error_that_says_what_is_short(
    asked: dict, nodes: list[dict], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        max_concurrent_trainings(ResourceSettings(**asked), nodes)


def test_a_node_with_the_same_files_and_versions_has_no_problem(tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    (tmp_path / "scan.nii").touch()
    folders = {"resources.storage": tmp_path}
    assert find_problems(folders, [tmp_path / "scan.nii"], "token", installed_versions()) == []


def test_each_problem_of_a_node_is_a_line_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    folders = {"resources.storage": tmp_path / "other", "resources.store": tmp_path / "gone", "here": Path("/proc")}
    own = installed_versions()
    found = find_problems(
        folders,
        [tmp_path / "scan.nii", tmp_path / "gone" / "scan.nii"],
        "version",
        own | {"Python": "2.7", "torch": "0.1"},
    )
    same = "mount the same one at this path on every node"
    assert found.pop(2).startswith("here=/proc cannot be written to: ")
    assert found == [
        f"resources.storage={tmp_path}/other is another folder here; {same}",
        f"resources.store={tmp_path}/gone is not there; {same}",
        f"the volume {tmp_path}/scan.nii is not there; mount the volumes at the same path on every node",
        f"has Python {own['Python']} instead of 2.7, torch {own['torch']} instead of 0.1; install the same versions on"
        " every node",
    ]


def test_nodes_are_not_checked_without_a_cluster(tmp_path: Path) -> None:
    check_nodes({"resources.storage": tmp_path / "gone"}, [tmp_path / "gone" / "scan.nii"])


def test_a_cluster_that_does_not_answer_is_an_error_that_names_the_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        for scheme in ("", "ray://"):
            address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(UserError, match=rf"^RAY_ADDRESS={address}: nothing answers there \(Connection refus"):
                check_reachable(address, f"RAY_ADDRESS={address}")
        taken.listen()
        check_reachable(address, "")
    for address in ("auto", "127.0.0.1", "http://host"):
        check_reachable(address, "")
    with pytest.raises(UserError, match=r"^here: nothing answers there"):
        check_reachable("127.0.0.1:99999", "here")


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_where_ray_cannot_make_sockets_is_an_error(
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
    monkeypatch.setenv(variable, "/tmp")
    monkeypatch.setattr("umbrella.cluster.SHARED_MEMORY", "/proc/self")
    with pytest.raises(UserError, match=r"^/proc/self, where Ray keeps objects, cannot be written to: "):
        check_local_folders()


def test_only_the_owner_can_read_the_token_of_a_local_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_one_script_at_a_time_takes_a_free_port_for_the_dashboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    with reserve_dashboard_port() as port, next(tmp_path.iterdir()).open() as file:
        assert not lock(file)
    with next(tmp_path.iterdir()).open() as file:
        assert lock(file)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with reserve_dashboard_port() as another:
            assert another != port
