"""Only one script at a time runs a training or sweep."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.evaluation_run.cohort_predictions import PredictionFile
from umbrella.fileio import run_lock

HOLD = """
import sys
from pathlib import Path
from umbrella.fileio import run_lock
with run_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_script_is_refused_until_the_process_of_the_first_one_ends(tmp_path: Path) -> None:
    folder = tmp_path / "sweeps" / "first"
    first = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match=rf"^first is in use by process {first.pid} on "), run_lock(folder):
        pass
    first.kill()
    first.communicate()
    with run_lock(folder):
        assert not folder.exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [("trainings", ["train.py", "name=first"]), ("sweeps", ["tune.py", "name=first"])],
)
def test_a_script_on_what_another_one_runs_ends_in_one_line_before_ray_starts(
    kind: str, words: list[str], tmp_path: Path, run: Callable[..., Any]
) -> None:
    with run_lock(tmp_path / kind / "first"):
        done = run(*words, f"resources.storage={tmp_path}")
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: first is in use by process ")


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_storage_without_locks_is_an_error_for_trainings_but_not_for_predictions(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    number = getattr(errno, name)

    def refuse(file: Any, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    done = run("train.py", f"resources.storage={tmp_path}")
    assert (done.status, done.stderr) == (
        2,
        f"error: {tmp_path}/trainings: files cannot be locked here ({os.strerror(number)}), by which scripts know of"
        " each other; have it mounted with locks (Lustre: -o flock), or take another folder\n",
    )
    with PredictionFile(tmp_path / "answers.jsonl", {"a": 1}).open():
        pass
