"""Trainings that are killed go on as if nothing had happened: the same losses to the bit, the same samples in order."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Done

from umbrella.base import UserError
from umbrella.training.progress import latest_checkpoint, read_progress

from .faults import (
    COHORT,
    LONGER,
    STEPS,
    TRAIN,
    TWO,
    entries,
    folder_of,
    go_on,
    kill_workers,
    left_by,
    plain_environment,
    run_of,
    samples,
    starts,
    when_step,
)  # fmt: skip

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def assert_each_once_per_epoch(folder: Path, epochs: int) -> None:
    seen = samples(folder)
    assert len(seen) >= COHORT * epochs
    for epoch in range(epochs):
        assert len(set(seen[COHORT * epoch : COHORT * (epoch + 1)])) == COHORT


def draw(last: int, name: str) -> int:
    """A step to kill at; another FAULT_SEED draws another one. See random_kills.py for many."""
    return random.Random(f"{os.environ.get('FAULT_SEED', '0')} {name}").randint(1, last)


@pytest.fixture(scope="module")
def never_stopped(small_settings: Callable[..., Any], ray_session: Any) -> tuple[list, list]:
    """What a training sees and loses that nothing happens to."""
    settings = small_settings({**LONGER, "name": "never-stopped"})
    return left_by(settings, go_on(settings))


def test_a_worker_killed_at_any_step_changes_nothing(
    small_settings: Callable[..., Any], never_stopped: tuple[list, list]
) -> None:
    step = draw(STEPS - 9, "worker")  # the kill takes some steps to arrive
    settings = small_settings({**LONGER, "name": f"killed-at-{step}"})
    folder = folder_of(settings)
    when_step(folder, step, kill_workers)
    assert go_on(settings) == folder
    assert len(starts(folder)) == 2, "it was killed, and started again"
    assert left_by(settings, folder) == never_stopped


def test_a_killed_driver_and_a_broken_checkpoint_change_nothing_when_the_command_is_given_again(
    small_settings: Callable[..., Any], never_stopped: tuple[list, list], capfd: pytest.CaptureFixture
) -> None:
    settings = small_settings({**LONGER, "name": "driver"})
    folder = folder_of(settings)
    file = Path(settings.resources.storage) / "driver.yaml"
    file.write_text(settings.to_yaml(), encoding="utf-8")
    driver = subprocess.Popen([sys.executable, TRAIN, file], stdout=subprocess.DEVNULL, env=plain_environment())
    when_step(folder, 23, driver.kill).join(100)
    assert driver.wait(60) == -signal.SIGKILL
    newest = latest_checkpoint(folder)
    assert newest is not None
    model = newest / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    older = latest_checkpoint(folder)
    assert older is not None
    assert older < newest

    again = [sys.executable, TRAIN, file]
    done = subprocess.run(again, capture_output=True, text=True, env=plain_environment(), timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"{newest} cannot be used: model.safetensors has" in done.stdout + done.stderr
    assert left_by(settings, folder) == never_stopped


def test_sigterm_saves_at_that_very_step_and_the_same_command_goes_on(
    small_settings: Callable[..., Any], never_stopped: tuple[list, list], run: Callable[..., Done]
) -> None:
    settings = small_settings({**LONGER, "name": "asked"})
    folder = folder_of(settings)
    file = Path(settings.resources.storage) / "asked.yaml"
    file.write_text(settings.to_yaml(), encoding="utf-8")
    asker = when_step(folder, draw(STEPS - 27, "SIGTERM"), lambda: os.kill(os.getpid(), signal.SIGTERM))
    done = run("train.py", str(file))
    asker.join(1)
    newest = latest_checkpoint(folder)
    assert newest is not None
    step = read_progress(newest).step
    line = f"stopped after step {step}, with a checkpoint; the same command, with name=asked, goes on"
    assert (done.status, done.stderr.splitlines()[-1]) == (143, line)
    _, ended = run_of(settings, "asked")
    assert (ended.info.status, ended.data.tags["umbrella.outcome"]) == ("KILLED", "asked to stop")

    go_on(settings)
    assert starts(folder) == [0, 4 * step], "no step was done twice"
    assert left_by(settings, folder) == never_stopped


def test_another_number_of_workers_goes_on_and_sees_each_conversation_once_per_epoch(
    small_settings: Callable[..., Any], run: Callable[..., Done]
) -> None:
    fixed = {**LONGER, "train.epochs": 8, "train.batch_size": 2, "name": "counts"}
    folder = folder_of(small_settings(fixed))
    file = Path(small_settings(fixed).resources.storage) / "counts.yaml"
    file.write_text(small_settings(fixed).to_yaml(), encoding="utf-8")
    when_step(folder, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run("train.py", str(file)).status == 143
    go_on(small_settings(fixed | TWO))
    assert [entry["workers"] for entry in entries(folder) if "start" in entry] == [1, 2]
    assert_each_once_per_epoch(folder, 8)


def unreadable(settings: Any) -> list[Path]:
    """Make every prepared volume a link to itself, which no worker can open; returns them, moved aside."""
    moved = []
    for array in (Path(settings.resources.storage) / "volumes").glob("*/*.npy"):
        moved.append(array.rename(array.with_suffix(".aside")))
        array.symlink_to(array)
    return moved


def readable(moved: list[Path]) -> None:
    for array in moved:
        array.replace(array.with_suffix(".npy"))


def test_a_worker_that_cannot_read_for_a_moment_is_started_again_and_nothing_changes(
    small_settings: Callable[..., Any], never_stopped: tuple[list, list]
) -> None:
    settings = small_settings({**LONGER, "name": "moment"})
    folder = folder_of(settings)

    def fail_once() -> None:
        moved = unreadable(settings)
        logged = len(starts(folder))
        time.sleep(1.5)  # batches that were made before are used up
        readable(moved)
        assert logged == 1

    when_step(folder, draw(STEPS - 9, "unreadable"), fail_once)
    go_on(settings)
    assert len(starts(folder)) == 2
    assert left_by(settings, folder) == never_stopped


def test_what_every_attempt_meets_ends_the_training_in_one_line_with_its_cause_and_the_last_good_checkpoint(
    small_settings: Callable[..., Any], never_stopped: tuple[list, list]
) -> None:
    settings = small_settings({**LONGER, "name": "for-ever", "resources.max_failures": 1})
    folder = folder_of(settings)
    moved: list[Path] = []
    breaker = when_step(folder, 12, lambda: moved.extend(unreadable(settings)))
    try:
        with pytest.raises(UserError) as raised:
            go_on(settings)
    finally:
        breaker.join(5)
        readable(moved)
    assert re.fullmatch(
        r"the training stopped: in 2 attempts \(resources.max_failures\) a worker died: OSError: .*Too many levels of"
        rf" symbolic links: '.*\.npy'; the last good checkpoint is {folder}/step_00000\d\d",
        str(raised.value),
    )
    _, ended = run_of(settings, "for-ever")
    assert (ended.info.status, ended.data.tags["umbrella.outcome"]) == ("FAILED", "failed")


def on_a_cluster(settings: Any, how: str) -> str:
    """A training whose nodes are lost, in a process with a Ray of its own; returns what it said."""
    file = Path(settings.resources.storage) / f"{settings.name}.yaml"
    file.write_text(settings.to_yaml(), encoding="utf-8")
    script = [sys.executable, str(Path(__file__).with_name("lost_node.py")), str(file), how]
    done = subprocess.run(script, capture_output=True, text=True, env=plain_environment(), timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_lost_node_changes_nothing_and_one_that_is_drained_is_left_with_a_checkpoint(
    small_settings: Callable[..., Any], never_stopped: tuple[list, list]
) -> None:
    settings = small_settings({**LONGER, "name": "moved"})
    said = re.search(r"saved at step (\d+) before its node went", on_a_cluster(settings, "moved"))
    folder = folder_of(settings)
    assert said
    assert starts(folder) == [0, 4 * 5, 4 * int(said[1])], "it went on from what it saved for the drain"
    assert left_by(settings, folder) == never_stopped


def test_with_fewer_workers_after_a_lost_node_each_conversation_comes_once_per_epoch(
    small_settings: Callable[..., Any],
) -> None:
    elastic = {"resources.workers": 2, "resources.min_workers": 1, "resources.cpus_per_worker": 2}
    settings = small_settings({**LONGER, **elastic, "train.batch_size": 2, "name": "fewer"})
    on_a_cluster(settings, "fewer")
    folder = folder_of(settings)
    workers = [entry["workers"] for entry in entries(folder) if "start" in entry]
    assert workers == [2, 2, 1]
    assert_each_once_per_epoch(folder, 12)
