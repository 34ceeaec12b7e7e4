"""Of two scripts on one training or sweep the second is refused, and the first one goes on as if it had not come."""

import fcntl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.written import all_of
from umbrella.base import UserError
from umbrella.config import Settings, load_settings
from umbrella.paths import BEGUN
from umbrella.training import cluster
from umbrella.training.run import run_training
from umbrella.training.run_lock import run_lock
from umbrella.tuning.sweep import run_sweep
from umbrella.tuning.sweep_files import SweepSpec, save_spec

HOLD = "import sys; from pathlib import Path; from umbrella.training.run_lock import run_lock\n"
HOLD += "with run_lock(Path(sys.argv[1])):\n    print('mine', flush=True)\n    sys.stdin.read()"


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes so far as to start a Ray fails."""
    monkeypatch.setattr(cluster, "start_ray", lambda *about, **more: pytest.fail("a Ray is started"))


def named_first(tmp_path: Path) -> Settings:
    place = {"resources.storage": str(tmp_path / "home")}
    return load_settings(overrides={"name": "first", "tune.space": {"optim.lr": {"grid": [1e-3, 1e-4]}}, **place})


def begin(folder: Path, settings: Settings) -> None:
    """What a script writes first."""
    folder.mkdir(parents=True)
    if folder.parent.name == "sweeps":
        save_spec(folder, SweepSpec(settings, frozenset()), "a" * 64)
    else:
        (folder / BEGUN).write_text("{}", encoding="utf-8")


def run_again(folder: Path, settings: Settings) -> None:
    """What a second script does."""
    if folder.parent.name == "sweeps":
        run_sweep(settings, frozenset(), all_of, folder)
    else:
        run_training(settings, all_of)


@pytest.mark.parametrize("kind", ["trainings", "sweeps"])
def test_a_second_script_is_refused_until_the_first_one_is_dead(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / kind / "first"
    first = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline() == b"mine\n"
    with pytest.raises(UserError, match=rf"^first is in use by process {first.pid} on "), run_lock(folder):
        pass
    first.kill()
    first.communicate()
    with run_lock(folder):
        assert not folder.exists()
    assert list(folder.parent.iterdir()) == []
    folder.parent.rmdir()
    with run_lock(folder):
        pass
    assert list(tmp_path.iterdir()) == [], "a folder that was not there"


@pytest.mark.parametrize(
    ("kind", "words"),
    [("trainings", ["train.py", "name=first"]), ("sweeps", ["tune.py", "name=first"]), ("sweeps", ["tune.py"])],
)
def test_a_script_on_what_is_being_run_ends_in_one_line_before_a_ray_is_started(
    kind: str, words: list[str], tmp_path: Path, run: Callable[..., Any]
) -> None:
    folder = tmp_path / "home" / kind / "first"
    begin(folder, named_first(tmp_path))
    words = words if "name=first" in words else [*words, "--resume", "first"]
    with run_lock(folder):
        done = run(*words, f"resources.storage={tmp_path}/home")
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: first is in use by process ")


def test_a_lock_that_its_holder_deletes_as_it_leaves_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lock, left = tmp_path / "sweeps/first", fcntl.flock, []

    def late(file: Any, how: int) -> None:
        if not left:  # between its opening and its locking here
            left.append(folder.with_name(".first.lock"))
            left[0].unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with run_lock(folder):
        with pytest.raises(UserError, match=r"^first is in use by "), run_lock(folder):
            pass
        assert left[0].exists()
