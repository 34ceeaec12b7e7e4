"""A sweep as it runs: a live table in a terminal, a line per event elsewhere, and true final states in MLflow."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback
from rich.console import Console
from rich.live import Live
from rich.table import Table

from umbrella.tracking.ending import close_trial
from umbrella.training.job import progress_line
from umbrella.training.live import EARLY, FINISHED
from umbrella.tuning.space import label

STOPPED, FAILED = "stopped by ASHA", "failed"
"""How a trial ends that did not end by itself; see ``live`` for the others."""


class Monitor(Callback):
    """Follows the trials of a sweep from the driver.

    Args:
        uri, folder: MLflow's store, and the sweep's folder: a trial's run is closed when its worker could not.
        total: how many trials there will be.
        metric: the one shown.
    """

    def __init__(self, uri: str, folder: Path, total: int, metric: str, console: Console | None = None) -> None:
        self.uri, self.folder, self.total, self.metric = uri, folder, total, metric
        self.console = console or Console()
        self.started = time.monotonic()
        self.trials: dict[str, dict[str, Any]] = {}
        self.live: Live | None = None

    def __enter__(self) -> "Monitor":
        if self.console.is_terminal:
            self.live = Live(console=self.console, get_renderable=self._table, refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self.live:
            self.live.stop()

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune saves its callbacks with the sweep; a terminal cannot be saved.
        return self.__dict__ | {"console": None, "live": None}

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A trial's process was asked for."""
        self.trials[trial.trial_id] = {"name": label(trial.config), "state": "running", "result": {}}
        self._say(trial.trial_id, "started")

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        """A trial evaluated."""
        if "step" in result:
            self.trials[trial.trial_id]["result"] = result
            self._say(trial.trial_id, progress_line(result))

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A trial reached its end, or the scheduler stopped it."""
        result = self.trials[trial.trial_id]["result"]
        state = how_it_ended(result) if result else STOPPED
        self._end(trial.trial_id, state, "KILLED" if state == STOPPED else "FINISHED")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A trial raised."""
        self._end(trial.trial_id, FAILED, "FAILED")

    def _end(self, trial_id: str, state: str, status: str) -> None:
        self.trials[trial_id]["state"] = state
        self._say(trial_id, state)
        close_trial(self.uri, self.folder / "trials" / trial_id, status, state)

    def _say(self, trial_id: str, words: str) -> None:
        if not self.live:
            print(f"{self._elapsed()}  {self.trials[trial_id]['name']}: {words}", flush=True)

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self.started)
        return f"{seconds // 60:02d}:{seconds % 60:02d}"

    def _table(self) -> Table:
        ended = sum(t["state"] != "running" for t in self.trials.values())
        table = Table(title=f"{ended} of {self.total} trials ended, {self._elapsed()}", title_justify="left")
        for name in ("trial", "state", "step", *table_columns(self.metric)):
            table.add_column(name, justify="left" if name in ("trial", "state") else "right")
        for trial in self.trials.values():
            result = trial["result"]
            step = f"{result['step']}/{result['steps']}" if result else ""
            values = [f"{result[name]:.4g}" if name in result else "" for name in table_columns(self.metric)]
            table.add_row(trial["name"], trial["state"], step, *values)
        return table


def how_it_ended(report: Mapping[str, Any]) -> str:
    """The end of a trial that nothing went wrong with, from its last report: FINISHED, EARLY or STOPPED."""
    if report["step"] >= report["steps"]:
        return FINISHED
    return EARLY if report["out_of_patience"] else STOPPED


def table_columns(metric: str) -> tuple[str, ...]:
    """The numbers shown of each trial."""
    return ("epoch", "train/loss", "eval/loss", metric)
