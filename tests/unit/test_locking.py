"""A file system without locks is named in one line, and nobody is taken for another one's holder of a lock."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.evaluation_run.cohort_predictions import PredictionFile
from umbrella.training import cluster
from umbrella.training.run_lock import run_lock


@pytest.fixture(params=["ENOSYS", "ENOLCK", "EOPNOTSUPP"], autouse=True)
def why(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """No file can be locked; gives the system's words for it, which differ by file system."""
    number = getattr(errno, request.param)

    def refuse(file: Any, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    return os.strerror(number)


@pytest.mark.parametrize("words", [["train.py"], ["tune.py"]])
def test_storage_without_locks_ends_a_script_in_one_line_before_a_ray_is_started(
    words: list[str], why: str, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "start_ray", lambda *about, **more: pytest.fail("a Ray is started"))
    done = run(*words, f"resources.storage={tmp_path}")
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    kind = "trainings" if words == ["train.py"] else "sweeps"
    assert done.stderr.startswith(f"error: {tmp_path}/{kind}: files cannot be locked here ({why})")
    assert done.stderr.endswith("; have it mounted with locks (Lustre: -o flock), or take another folder\n")


def test_where_nothing_could_be_kept_from_being_lost_the_folder_is_named(why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/box\S*: files cannot be locked here") as refused:
        run_lock(tmp_path / "box/sweeps/first").__enter__()
    assert "is in use by" not in str(refused.value)


def test_where_nothing_can_be_said_of_others_work_goes_on(tmp_path: Path) -> None:
    with PredictionFile(tmp_path / "answers.jsonl", {"a": 1}).open():
        pass
