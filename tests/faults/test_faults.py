"""Killed trainings resume exactly: equal losses bit for bit, and equal samples in order."""

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Done
from tests.faults.fault_injection import (
    LONGER,
    TRAIN,
    TWO,
    assert_each_once_per_epoch,
    at_step,
    count_batches,
    environment_without_ray,
    find_run,
    folder_of,
    kill_workers,
    killed_once,
    losses_and_samples,
    sample_log,
    start_positions,
    train_to_end,
    wait_until,
    write_settings,
)  # fmt: skip
from tests.printed import unknown_lines
from tests.ray.conftest import train_here
from umbrella.base import UserError
from umbrella.training.checkpoint_files import latest_checkpoint, read_training_state

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def draw(last: int, name: str) -> int:
    """Draw the step of a kill; FAULT_SEED changes it. random_kills.py draws many."""
    return random.Random(f"{os.environ.get('FAULT_SEED', '0')} {name}").randint(1, last)


@pytest.fixture(scope="module")
def uninterrupted(small_settings: Callable[..., Any], ray_session: Any) -> tuple[list, list]:
    """Losses and samples of an uninterrupted training in this process; the killed ones run on Ray Train."""
    settings = small_settings({**LONGER, "name": "never-stopped"})
    return losses_and_samples(settings, train_here(settings).folder)


def break_volumes(settings: Any) -> list[Path]:
    """Replace each preprocessed volume by a link to itself, which cannot be opened. Returns the moved files."""
    moved = []
    for array in (Path(settings.resources.storage) / "volumes").glob("*/*.npy"):
        moved.append(array.rename(array.with_suffix(".aside")))
        array.symlink_to(array)
    return moved


def restore_volumes(moved: list[Path]) -> None:
    for array in moved:
        array.replace(array.with_suffix(".npy"))


def test_killed_and_raising_workers_are_restarted_and_a_repeated_failure_is_one_line(
    small_settings: Callable[..., Any], uninterrupted: tuple[list, list]
) -> None:
    settings = small_settings({**LONGER, "name": "attempts", "resources.max_failures": 2})
    folder = folder_of(settings)
    at_step(folder, draw(12, "worker"), kill_workers)
    moved: list[Path] = []
    breaker = at_step(folder, 28, lambda: moved.extend(break_volumes(settings)))  # up to 8 of these were repeated
    try:
        with pytest.raises(UserError) as raised:
            train_to_end(settings)
    finally:
        breaker.join(5)
        restore_volumes(moved)
    last = latest_checkpoint(folder)
    assert re.fullmatch(
        r"the training stopped: in 3 attempts \(resources.max_failures\) a worker died: OSError: .*Too many levels of"
        rf" symbolic links: '.*\.npy'; the last good checkpoint is {last}",
        str(raised.value),
    )
    _, ended = find_run(settings, "attempts")
    assert (ended.info.status, ended.data.tags["umbrella.outcome"]) == ("FAILED", "failed")

    train_to_end(settings)
    begun = start_positions(folder)
    assert len(begun) == 4, "killed, raised, raised again, and resumed"
    assert 0 < begun[2] == begun[3] == 4 * read_step(last)
    assert losses_and_samples(settings, folder) == uninterrupted


def read_step(checkpoint: Path | None) -> int:
    assert checkpoint is not None
    return int(checkpoint.name.removeprefix("step_"))


@pytest.mark.ci
def test_resume_after_killed_driver_damaged_checkpoint_and_sigterm_is_exact(
    small_settings: Callable[..., Any],
    uninterrupted: tuple[list, list],
    run: Callable[..., Done],
    capsys: pytest.CaptureFixture,
) -> None:
    often = {"train.evaluate_every": 1, "name": "again"}  # long enough for the signals
    settings = small_settings({**LONGER, **often})
    folder, file = folder_of(settings), write_settings(settings)
    driver = subprocess.Popen([sys.executable, TRAIN, file], stdout=subprocess.DEVNULL, env=environment_without_ray())
    wait_until(lambda: count_batches(folder) >= 18, driver)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    assert driver.wait(60) == -signal.SIGKILL
    psutil.wait_procs(family, 60)  # its worker ends when it notices
    newest = latest_checkpoint(folder)
    assert newest is not None
    model = newest / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    capsys.readouterr()
    older = latest_checkpoint(folder)
    assert older is not None
    assert older < newest
    assert f"{newest} cannot be used: model.safetensors has" in capsys.readouterr().err

    asked = count_batches(folder) + draw(9, "SIGTERM")
    asker = at_step(folder, asked, lambda: os.kill(os.getpid(), signal.SIGTERM))
    done = run("train.py", str(file))
    asker.join(1)
    step = read_step(latest_checkpoint(folder))
    line = f"stopped after step {step} with a checkpoint; umbrella train --resume again continues"
    assert (done.status, done.stderr.splitlines()[-1]) == (143, line)
    _, ended = find_run(settings, "again")
    assert (ended.info.status, ended.data.tags["umbrella.outcome"]) == ("KILLED", "asked to stop")

    train_to_end(settings)
    assert start_positions(folder) == [0, 4 * read_step(older), 4 * step], "SIGTERM repeats no step"
    assert losses_and_samples(settings, folder) == uninterrupted


def test_ctrl_c_ends_a_training_with_one_line_and_status_130(
    small_settings: Callable[..., Any], tmp_path: Path
) -> None:
    settings = small_settings({**LONGER, "train.epochs": 600, "name": "keyboard"})
    folder, file = folder_of(settings), write_settings(settings)
    # A background shell ignores SIGINT, and the script would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    command, output = [sys.executable, TRAIN, file], tmp_path / "output"
    with output.open("w", encoding="utf-8") as into:
        script = subprocess.Popen(command, stdout=into, stderr=subprocess.STDOUT, env=environment_without_ray())
    signal.signal(signal.SIGINT, before)
    wait_until(lambda: count_batches(folder) >= 3, script)
    script.send_signal(signal.SIGINT)
    assert script.wait(60) == 130
    lines = output.read_text(encoding="utf-8")
    assert lines.count("stopped by the keyboard\n") == 1  # Ray may print a last line of a worker after it
    assert unknown_lines(lines) == []
    _, ended = find_run(settings, "keyboard")
    assert (ended.info.status, ended.data.tags["umbrella.outcome"]) == ("KILLED", "killed")


def test_resume_on_another_number_of_workers_sees_each_sample_once_per_epoch(
    small_settings: Callable[..., Any], run: Callable[..., Done]
) -> None:
    fixed = {**LONGER, "train.epochs": 6, "train.batch_size": 2, "name": "counts"}
    folder = folder_of(small_settings(fixed))
    at_step(folder, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run("train.py", str(write_settings(small_settings(fixed)))).status == 143
    train_to_end(small_settings(fixed | TWO))
    # Each worker logs its start.
    assert [entry["workers"] for entry in sample_log(folder) if "start" in entry] == [1, 2, 2]
    assert_each_once_per_epoch(folder, 6)


def test_killed_sharded_worker_changes_no_loss_and_not_the_step_at_which_patience_ends(
    small_settings: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = {"train.patience": 2, "tune.metric": "eval/loss", "tune.mode": "max"}  # the first evaluation is the best
    settings = {**LONGER, **TWO, **stops, "train.shard": True, "train.batch_size": 2}
    curves = []
    for name in ("sharded", "sharded-killed"):
        folder = train_to_end(small_settings({**settings, "name": name}))
        client, found = find_run(small_settings(settings), name)
        assert found.data.tags["umbrella.outcome"] == "stopped early"
        curves.append([(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "train/loss")])
        monkeypatch.setattr("umbrella.training.run.LANGUAGE_MODEL", killed_once(12, tmp_path / "killed"))
    assert (tmp_path / "killed").exists()
    assert start_positions(folder) == [0, 0, 40, 40]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 15
    newest = latest_checkpoint(folder)
    assert newest is not None
    assert read_training_state(newest).since_best == 2
