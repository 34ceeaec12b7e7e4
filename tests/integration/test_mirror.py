"""A machine that is lost with its storage: trainings and sweeps go on from the mirror as if nothing had happened."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Done
from sweep_kills import TUNE, faults_in, question

from umbrella.config import Settings
from umbrella.training import ownership
from umbrella.training.history import read_history
from umbrella.training.progress import latest_checkpoint

from .faults import LONGER, STEPS, TRAIN, folder_of, go_on, left_by, plain_environment, starts

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

QUICK = "from umbrella.training import mirror; mirror.EVERY = 0.1; import runpy, sys; del sys.argv[0]; "
QUICK += "runpy.run_path(sys.argv[0], run_name='__main__')"
"""Runs a script that looks more often for what is new."""


def lose(settings: Settings, script: Path, folder: Path, enough: Callable[[], Any]) -> None:
    """Run a script on a file of settings until enough is in the mirror; then it is killed, and its folder deleted."""
    file = Path(settings.resources.storage) / f"{folder.name}.yaml"
    file.write_text(settings.to_yaml(), encoding="utf-8")
    words = [sys.executable, "-c", QUICK, str(script), str(file)]
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=plain_environment())
    while driver.poll() is None and not enough():
        time.sleep(0.02)
    started = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
    driver.kill()
    assert driver.wait() == -signal.SIGKILL, "it was not over yet"
    for process in started:  # which would go with the machine, too
        with suppress(psutil.NoSuchProcess):
            process.kill()
    shutil.rmtree(folder)


def test_a_training_whose_folder_is_lost_goes_on_from_the_mirror_bit_for_bit(
    small_settings: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = small_settings({**LONGER, "name": "undisturbed"})
    undisturbed = left_by(alone, go_on(alone))

    settings = small_settings({**LONGER, "name": "moved-away", "resources.mirror": f"file://{tmp_path}/mirror"})
    folder, there = folder_of(settings), tmp_path / "mirror/trainings/moved-away"
    lose(settings, TRAIN, folder, lambda: list(there.glob("step_*/files.json")))
    kept = latest_checkpoint(there)
    assert kept is not None
    monkeypatch.setattr(ownership, "SILENT", 1.0)
    go_on(settings)
    step = int(kept.name.removeprefix("step_"))
    assert starts(folder) == [0, 4 * step]
    assert left_by(settings, folder) == undisturbed
    assert {path.name for path in there.glob("step_*")} == {path.name for path in folder.glob("step_*")}
    assert latest_checkpoint(there) == there / f"step_{STEPS:07d}"


def test_a_sweep_of_which_only_the_mirror_is_left_goes_on_to_one_true_run_per_trial(
    tmp_path: Path, run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"file://{tmp_path}/mirror"
    settings = question(tmp_path, trials=3).with_values({"name": "lost", "resources.mirror": address})
    folder, there = tmp_path / "sweeps/lost", tmp_path / "mirror/sweeps/lost"
    lose(settings, TUNE, folder, lambda: list(there.glob("trials/*/end.json")))
    ended = {file.parent.name: read_history(file.parent) for file in there.glob("trials/*/end.json")}
    assert 1 <= len(ended) < 3
    monkeypatch.setattr(ownership, "SILENT", 1.0)
    done = run("tune.py", "--resume", "last", f"resources.storage={tmp_path}", f"resources.mirror={address}")
    assert done.status == 0, done.stderr
    assert faults_in(settings) == []
    assert {name: read_history(folder / "trials" / name) for name in ended} == ended, "not run again"
    assert {file.name for file in there.iterdir()} >= {"report.html", "ranking.csv", "best.yaml"}
