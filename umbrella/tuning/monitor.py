"""A sweep as it runs: a live table in a terminal, a line per event elsewhere, and true final states in MLflow."""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from ray.tune import Callback
from rich.console import Console
from rich.live import Live
from rich.table import Table

from umbrella.base import printable
from umbrella.paths import TRIALS
from umbrella.tracking.mlflow_logger import PARENT, MlflowLogger
from umbrella.tracking.run_status import close_run
from umbrella.training.launch import describe_failure
from umbrella.training.progress_log import progress_line
from umbrella.training.training_state import read_history
from umbrella.tuning.results import read_trials
from umbrella.tuning.search_space import format_point
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.sweep_files import (
    FAILED,
    OUT_OF_TIME,
    STOPPED,
    UNFINISHED,
    final_state,
    load_status,
    make_trial_folder,
    save_status,
    trial_id_of,
)

STATUS = {FAILED: "FAILED", STOPPED: "KILLED", OUT_OF_TIME: "KILLED"}
"""How MLflow calls what did not end by itself."""
GIVE_UP = 10**6
"""Failures that no ``resources.max_failures`` allows."""
RUNNING = "running"
"""The state of a trial that has not ended."""


class OutOfTime(Exception):
    """``tune.hours`` are over. Raised in Ray Tune, which then keeps what it knows as of a script that is stopped.

    Its own budget counts trials that it stops as ended, and the search too: such a sweep could not go on.
    """


class Monitor:
    """Follows the trials of a sweep from the driver.

    Args:
        folder: the sweep's. Trials that have ended there before are shown with the others.
        parent: the sweep's run. The runs of trials that did not end them are closed in its store.
        total: how many trials there will be.
    """

    current: ClassVar["Monitor | None"] = None
    """The one that this process is in."""

    def __init__(
        self, folder: Path, parent: MlflowLogger, total: int, tune: TuneSettings, console: Console | None = None
    ) -> None:
        self.folder, self.parent, self.total, self.tune = folder, parent, total, tune
        self.console = console or Console()
        self.started = time.monotonic()
        self.trials: dict[str, dict[str, Any]] = {}
        self.live: Live | None = None

    def __enter__(self) -> "Monitor":
        for trial in read_trials(self.folder, self.tune):
            if trial.state != UNFINISHED:
                rows = read_history(self._trial_folder(trial.trial_id)) or [{}]
                self.trials[trial.trial_id] = {"name": trial.name, "state": trial.state, "result": rows[-1]}
            self._repair_run(trial.trial_id, trial.state)
        Monitor.current = self
        if self.console.is_terminal:
            self.live = Live(console=self.console, get_renderable=self._table, refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(self, *unused: object) -> None:
        Monitor.current = None
        if self.live:
            self.live.stop()

    def close(self, state: str) -> None:
        """Close the runs of the trials that are running, because the sweep ends."""
        for name, trial in self.trials.items():
            if trial["state"] == RUNNING:
                close_run(self.parent.uri, self._trial_folder(name), "KILLED", state)

    def check_time(self) -> None:
        """Raise OutOfTime when it is."""
        if self.tune.hours and time.monotonic() - self.started >= 3600 * self.tune.hours:
            raise OutOfTime

    def stop_all(self) -> None:
        """End the trials that are running, because the time is over."""
        for name, trial in self.trials.items():
            if trial["state"] == RUNNING:
                result = trial["result"]
                where = f"step {result['step']} of {result['steps']}" if result else "before its first evaluation"
                self._end(name, OUT_OF_TIME, f"after {self.tune.hours:g} hours (tune.hours), {where}")

    def start(self, trial: Any) -> None:
        """A trial's process was asked for."""
        folder = make_trial_folder(self.folder, trial.trial_id, trial.config)
        known = self.trials.get(trial_id_of(folder))
        self.trials[trial_id_of(folder)] = (known or {"result": {}}) | {
            "name": format_point(trial.config),
            "state": RUNNING,
        }
        if not load_status(folder):
            self._print(trial_id_of(folder), "goes on" if known else "started")

    def recover(self, trial: Any) -> None:
        """A trial raised, or its process died, and Ray Tune is about to try again."""
        if load_status(make_trial_folder(self.folder, trial.trial_id, trial.config)):
            trial.run_metadata.num_failures = GIVE_UP  # the training said itself that trying again would not help

    def result(self, trial: Any, result: dict[str, Any]) -> None:
        """A trial evaluated."""
        name = trial_id_of(make_trial_folder(self.folder, trial.trial_id, trial.config))
        last = self.trials[name]["result"]
        if "step" in result and result["step"] > last.get("step", 0):  # else it is told again
            self.trials[name]["result"] = result
            self._print(name, progress_line(result))

    def end(self, trial: Any, error: BaseException | None = None) -> None:
        """A trial reached its end, was stopped, or failed."""
        folder = make_trial_folder(self.folder, trial.trial_id, trial.config)
        name = trial_id_of(folder)
        # Its process may never have started.
        result = self.trials.setdefault(name, {"name": format_point(trial.config), "result": {}})["result"]
        if error:
            # Ray names the class with its module before what it says.
            self._end(name, FAILED, describe_failure(error).removeprefix("umbrella.base.UserError: "))
        else:
            self._end(name, *self._final_state(result))

    def _end(self, name: str, state: str, reason: str) -> None:
        save_status(self._trial_folder(name), state, reason)
        end = load_status(self._trial_folder(name))
        if end:
            self.trials[name]["state"] = end.state
            self._print(name, f"{end.state}{end.reason and f': {end.reason}'}")
            close_run(self.parent.uri, self._trial_folder(name), STATUS.get(end.state, "FINISHED"), end.state)

    def _final_state(self, result: Mapping[str, Any]) -> tuple[str, str]:
        """Of a trial that raised nothing: its state, and why it did not come to its end."""
        if not result:
            return FAILED, "it ended before its first evaluation"
        state, where = final_state(result), f"step {result['step']} of {result['steps']}"
        if state == STOPPED:
            return state, f"by ASHA at evaluation {result['evaluation']}, {where}"
        return state, "" if result["step"] >= result["steps"] else f"train.patience is over, {where}"

    def _repair_run(self, name: str, state: str) -> None:
        """Correct a trial's run that a killed script left RUNNING, under another parent, or not sent to its end."""
        status, outcome = STATUS.get(state, "FINISHED"), state
        if state == UNFINISHED:
            status, outcome = "KILLED", "its script was killed"
        parent = {PARENT: self.parent.run_id}
        close_run(self.parent.uri, self._trial_folder(name), status, outcome, self.parent.experiment, parent)

    def _trial_folder(self, name: str) -> Path:
        return self.folder / TRIALS / name.rpartition("-")[2]

    def _print(self, name: str, words: str) -> None:
        if not self.live:
            print(f"{self._elapsed()}  {self.trials[name]['name']}: {printable(words)}", flush=True)

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self.started)
        return f"{seconds // 60:02d}:{seconds % 60:02d}"

    def _table(self) -> Table:
        ended = sum(t["state"] != RUNNING for t in self.trials.values())
        table = Table(title=f"{ended} of {self.total} trials ended, {self._elapsed()}", title_justify="left")
        for name in ("trial", "state", "step", *table_columns(self.tune.metric)):
            table.add_column(name, justify="left" if name in ("trial", "state") else "right")
        for trial in self.trials.values():
            result = trial["result"]
            step = f"{result['step']}/{result['steps']}" if result else ""
            values = [f"{result[name]:.4g}" if name in result else "" for name in table_columns(self.tune.metric)]
            table.add_row(trial["name"], trial["state"], step, *values)
        return table


class MonitorCallback(Callback):
    """Tells this process's ``Monitor``. Ray Tune keeps its callbacks with the sweep, and a terminal cannot be kept."""

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        if Monitor.current:
            Monitor.current.check_time()

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if Monitor.current:
            Monitor.current.start(trial)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        if Monitor.current:
            Monitor.current.result(trial, result)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if Monitor.current:
            Monitor.current.recover(trial)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if Monitor.current:
            Monitor.current.end(trial)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if Monitor.current:
            Monitor.current.end(trial, _error_of(trial))


def _error_of(trial: Any) -> BaseException:
    with suppress(EOFError):  # it is written still
        if error := trial.get_pickled_error():
            return error
    return trial.get_error() or RuntimeError("its process died")


def table_columns(metric: str) -> tuple[str, ...]:
    """The numbers shown of each trial."""
    return ("epoch", "train/loss", "eval/loss", metric)
