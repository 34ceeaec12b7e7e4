"""Progress of a sweep: a live table in a terminal, otherwise a line per event; correct final states in MLflow."""

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
from umbrella.tracking.mlflow_logger import PARENT, MlflowLogger, close_run
from umbrella.training.checkpoint_files import read_history
from umbrella.training.launch import describe_failure
from umbrella.training.progress_log import progress_line
from umbrella.tuning.results import read_trials
from umbrella.tuning.search_space import format_point
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.sweep_files import (
    FAILED,
    OUT_OF_TIME,
    STOPPED,
    UNFINISHED,
    final_state,
    load_outcome,
    make_trial_folder,
    save_outcome,
    trial_id_of,
)

STATUS = {FAILED: "FAILED", STOPPED: "KILLED", OUT_OF_TIME: "KILLED"}
"""MLflow's run status for states other than a normal end."""
GIVE_UP = 10**6
"""Number of failures above every ``resources.max_failures``."""
RUNNING = "running"
"""The state of a trial that has not ended."""


class OutOfTime(Exception):
    """The time limit ``tune.hours`` is exceeded.

    The exception ends Ray Tune as an interrupt does, so that the sweep can be resumed. Ray Tune's own time budget would
    mark the trials and the search as completed.
    """


class Monitor:
    """Shows the progress of the trials of a sweep, saves their outcomes, and closes their MLflow runs.

    Args:
        folder: of the sweep. Trials that have already ended are shown, too.
        parent: MLflow run of the sweep.
        total: number of trials.
        tune: settings of the sweep.
        console: where the live table is shown; standard output if None.
    """

    current: ClassVar["Monitor | None"] = None
    """The active monitor of this process."""

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
        """Close the MLflow runs of running trials because the sweep is interrupted."""
        for name, trial in self.trials.items():
            if trial["state"] == RUNNING:
                close_run(self.parent.uri, self._trial_folder(name), "KILLED", state)

    def check_time(self) -> None:
        """Raise OutOfTime if the time limit is exceeded."""
        if self.tune.hours and time.monotonic() - self.started >= 3600 * self.tune.hours:
            raise OutOfTime

    def stop_all(self) -> None:
        """End the running trials because the time limit is exceeded."""
        for name, trial in self.trials.items():
            if trial["state"] == RUNNING:
                result = trial["result"]
                where = f"step {result['step']} of {result['steps']}" if result else "before its first evaluation"
                self._end(name, OUT_OF_TIME, f"after {self.tune.hours:g} hours (tune.hours), {where}")

    def start(self, trial: Any) -> None:
        """Record that a trial starts or resumes."""
        folder = make_trial_folder(self.folder, trial.trial_id, trial.config)
        name = trial_id_of(folder)
        known = self.trials.get(name)
        self.trials[name] = (known or {"result": {}}) | {"name": format_point(trial.config), "state": RUNNING}
        if not load_outcome(folder):
            self._print(name, "resumed" if known else "started")

    def recover(self, trial: Any) -> None:
        """Prevent that Ray Tune retries a trial with a saved outcome: it would fail again."""
        if load_outcome(make_trial_folder(self.folder, trial.trial_id, trial.config)):
            trial.run_metadata.num_failures = GIVE_UP

    def result(self, trial: Any, result: dict[str, Any]) -> None:
        """Record an evaluation of a trial."""
        name = trial_id_of(make_trial_folder(self.folder, trial.trial_id, trial.config))
        last = self.trials[name]["result"]
        if "step" in result and result["step"] > last.get("step", 0):  # a resumed trial reports old results again
            self.trials[name]["result"] = result
            self._print(name, progress_line(result))

    def end(self, trial: Any, error: BaseException | None = None) -> None:
        """Record that a trial finished, was stopped or failed."""
        folder = make_trial_folder(self.folder, trial.trial_id, trial.config)
        name = trial_id_of(folder)
        # ``start`` is not called if the process of a trial cannot start.
        result = self.trials.setdefault(name, {"name": format_point(trial.config), "result": {}})["result"]
        if error:
            # Ray puts the name of the exception class before its message.
            self._end(name, FAILED, describe_failure(error).removeprefix("umbrella.base.UserError: "))
        else:
            self._end(name, *self._outcome(result))

    def _end(self, name: str, state: str, reason: str) -> None:
        save_outcome(self._trial_folder(name), state, reason)
        outcome = load_outcome(self._trial_folder(name))  # an earlier outcome has priority
        if outcome:
            state, reason = outcome
            self.trials[name]["state"] = state
            self._print(name, f"{state}: {reason}" if reason else state)
            close_run(self.parent.uri, self._trial_folder(name), STATUS.get(state, "FINISHED"), state)

    def _outcome(self, result: Mapping[str, Any]) -> tuple[str, str]:
        """State and reason of a trial that ended without an error."""
        if not result:
            return FAILED, "the trial ended before its first evaluation"
        state, where = final_state(result), f"step {result['step']} of {result['steps']}"
        if state == STOPPED:
            return state, f"by ASHA at evaluation {result['evaluation']}, {where}"
        return state, "" if result["step"] >= result["steps"] else f"train.patience is over, {where}"

    def _repair_run(self, name: str, state: str) -> None:
        """Correct the MLflow run of a trial after a kill: status, parent, and metrics that were not sent."""
        status, outcome = STATUS.get(state, "FINISHED"), state
        if state == UNFINISHED:
            status, outcome = "KILLED", "its script was killed"
        parent = {PARENT: self.parent.run_id}
        close_run(self.parent.uri, self._trial_folder(name), status, outcome, self.parent.experiment, parent)

    def _trial_folder(self, name: str) -> Path:
        return self.folder / TRIALS / name.rpartition("-")[2]

    def _print(self, name: str, message: str) -> None:
        if not self.live:
            print(f"{self._elapsed()}  {self.trials[name]['name']}: {printable(message)}", flush=True)

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
    """Forwards events to ``Monitor.current``. Ray Tune pickles callbacks, and a terminal cannot be pickled."""

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
    with suppress(EOFError):  # Ray has not finished writing the file
        if error := trial.get_pickled_error():
            return error
    return trial.get_error() or RuntimeError("its process died")


def table_columns(metric: str) -> tuple[str, ...]:
    """Numbers that the live table shows for each trial."""
    return ("epoch", "train/loss", "eval/loss", metric)
