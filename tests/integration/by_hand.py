"""Trainings whose nodes are lost go on elsewhere. Three minutes, so by hand: pytest tests/integration/by_hand.py

pytest does not collect a file of this name unless it is told to.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .faults import LONGER, entries, folder_of, left_by, plain_environment, starts
from .test_faults import assert_each_once_per_epoch, never_stopped, put  # noqa: F401  # a fixture is used by its name

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def on_a_cluster(settings: Any, how: str) -> str:
    """A training whose nodes are lost, in a process with a Ray of its own; returns what it said."""
    script = [sys.executable, str(Path(__file__).with_name("lost_node.py")), str(put(settings)), how]
    done = subprocess.run(script, capture_output=True, text=True, env=plain_environment(), timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_lost_node_changes_nothing_and_one_that_is_drained_is_left_with_a_checkpoint(
    small_settings: Callable[..., Any],
    never_stopped: tuple[list, list],  # noqa: F811
) -> None:
    settings = small_settings({**LONGER, "name": "moved"})
    said = re.search(r"saved at step (\d+) before its node went", on_a_cluster(settings, "moved"))
    folder = folder_of(settings)
    assert said
    assert len(starts(folder)) == 3
    assert starts(folder)[2] == 4 * int(said[1]), "it went on from what it saved for the drain"
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
