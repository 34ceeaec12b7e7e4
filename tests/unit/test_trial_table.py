"""The tables of trials on the terminal: what they show, in any width and height, and the estimate of the time left."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from umbrella.plots import shorten
from umbrella.tracking.mlflow_logger import MlflowLogger
from umbrella.tuning.monitor import RUNNING, Monitor
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.sweep_files import STOPPED
from umbrella.tuning.trial_table import trial_table

METRIC = "eval/sex/balanced_accuracy"
NOW = 1_000_000.0
SWEPT: dict[str, Sequence[Any]] = {
    "optim.lr": (1e-4, 3e-4, 7e-4),
    "mask.supervise": ("all", "assistant", "last_assistant"),
    "model.train": ("embedder", "embedder+projector", "embedder+projector+lora"),
    "modalities.sMRI": ({"grid": [96, 96, 96], "patch": [16, 16, 16]}, {"grid": [96, 96, 96], "patch": [12, 12, 12]}),
    "train.epochs": (20,),
}


def point(number: int) -> dict[str, Any]:
    return {name: values[number % len(values)] for name, values in SWEPT.items()}


@pytest.fixture
def monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Monitor:
    monkeypatch.setattr("time.time", lambda: NOW)
    parent = MlflowLogger(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)  # a table sends nothing
    return Monitor(tmp_path, parent, 50, TuneSettings(metric=METRIC))


def add(monitor: Monitor, state: str, step: int, seconds: float, metric: float = 0.5, first: int = 0) -> None:
    """Add a trial that began ``seconds`` ago after a first step, and evaluated just now, at a step of 100.

    Step 0: no evaluation yet.
    """
    number = len(monitor.trials)
    result = {"step": step, "steps": 100, "begun": NOW - seconds, "begun_at_step": first, "time": NOW}
    result |= {METRIC: metric, "eval/loss": 0.5}
    monitor.trials[str(number)] = {"point": point(number), "state": state, "result": result if step else {}}


def printed(table: RenderableType, width: int) -> list[str]:
    console = Console(width=width, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines() if line.strip()]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_settings_that_differ_are_columns_and_no_two_values_look_equal(width: int) -> None:
    points = [point(number) for number in range(6)]
    others = {"state": ["ended by ASHA"] * 6, "step": ["360/1190"] * 6, "eval/loss": [""] * 6, METRIC: ["0.5"] * 6}
    table = trial_table(points, others, width)
    names = ["lr", "supervise", "train", "sMRI"] if width > 80 else ["lr", "sup…se", "train", "sMRI"]
    assert [column.header for column in table.columns][:-4] == names, "not epochs, which is equal in all trials"
    for column, values in zip(table.columns, SWEPT.values(), strict=False):
        assert len(set(column.cells)) == len(values)
    lines = printed(table, width)
    assert max(map(len, lines)) <= width
    assert len(lines) == 3 + len(points), "one line for each trial"
    assert len(set(lines)) == len(lines)


def test_names_and_values_are_shortened_in_the_middle_as_far_as_they_stay_different() -> None:
    assert shorten(["last_assistant", "all"], 8) == ["last…ant", "all"]
    assert shorten(["abcdefgh-1-xyz", "abcdefgh-2-xyz"], 8) == ["abcde…1-xyz", "abcde…2-xyz"]
    assert shorten(["aaaXbbb", "aaaYbbb"], 2) == ["aaaXbbb", "aaaYbbb"]


def test_the_table_of_a_long_sweep_fits_into_the_terminal_and_counts_the_rest(monitor: Monitor) -> None:
    for number in range(40):
        add(monitor, STOPPED if number % 4 else "finished", 60, 30, metric=number / 40)
    add(monitor, RUNNING, 10, 30)
    add(monitor, RUNNING, 0, 0)
    lines = printed(monitor.table(120, 24), 120)
    assert len(lines) <= 24
    assert lines[0].partition("  ")[2].startswith("40 of 50 trials ended, 2 running, 8 pending, about ")
    states = [line.split()[4:6] for line in lines if "/100" in line or "running" in line][1:]
    assert states[0][0] == states[1][0] == "running", "running trials first"
    assert [line.split()[-1] for line in lines if "/100" in line][1:4] == ["0.975", "0.95", "0.925"], "the best first"
    hidden = 42 - len([line for line in lines[1:-1] if "0.5" in line or "running" in line])
    assert lines[-1].startswith(f"and {hidden} more: "), lines
    assert len(printed(monitor.table(80, 24), 80)[0]) <= 80


def test_the_time_left_is_that_of_the_work_left_over_the_trials_that_run_at_once(monitor: Monitor) -> None:
    assert monitor._seconds_left(0) is None
    monitor.total, monitor.concurrent = 6, 2
    add(monitor, RUNNING, 0, 5)
    assert monitor._seconds_left(1) is None
    add(monitor, RUNNING, 50, 100)  # 100 s left, of 200
    assert monitor._seconds_left(2) == (100 + 5 * 200) / 2
    add(monitor, STOPPED, 30, 60)
    assert monitor._seconds_left(2) == (100 + 4 * 60) / 2, "others take as long as those that ended"
    monitor.total = 3
    monitor.trials["0"]["state"] = "failed"
    assert monitor._seconds_left(1) == 100, "the trial that runs ends last"
    add(monitor, RUNNING, 60, 40, first=40)  # resumed: 40 steps are left, of 2 s each
    monitor.total = 5
    assert monitor._seconds_left(2) == (100 + 80 + 60) / 2
