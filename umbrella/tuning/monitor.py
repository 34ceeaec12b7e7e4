"""Progress of a sweep: a live table in a terminal, otherwise a line per event; correct final states in MLflow."""

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from ray.tune import Callback
from rich.console import Console, Group
from rich.live import Live

from umbrella.base import printable
from umbrella.paths import TRIALS
from umbrella.tracking.mlflow_logger import PARENT, MlflowLogger, close_run
from umbrella.training.checkpoint_files import LOSS, ranking_key
from umbrella.training.launch import describe_failure
from umbrella.training.progress_log import FINISHED, STOPPED_EARLY, format_duration, progress_line
from umbrella.tuning.results import count_states, read_trials
from umbrella.tuning.search_space import format_point
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.sweep_files import (
    FAILED,
    OUT_OF_TIME,
    STOPPED,
    UNFINISHED,
    load_outcome,
    make_trial_folder,
    save_outcome,
    trial_id_of,
)
from umbrella.tuning.trial_table import short_state, trial_table

STATUS = {FAILED: "FAILED", STOPPED: "KILLED", OUT_OF_TIME: "KILLED"}
"""MLflow's run status for states other than a normal end."""
GIVE_UP = 10**6
"""Number of failures above every ``resources.max_failures``."""
RUNNING = "running"
"""The state of a trial that has not ended."""
TABLE_LINES = 7
"""Lines beside the rows: title (two in a narrow terminal), header (two), rule, last line, and cursor."""


class OutOfTime(Exception):
    """The time limit ``tune.hours`` is exceeded.

    The exception ends Ray Tune as an interrupt does, so that the sweep can be resumed. Ray Tune's own time budget would
    mark the trials and the search as completed.
    """


class Monitor(Callback):
    """Shows the progress of the trials of a sweep, saves their outcomes, and closes their MLflow runs.

    Ray Tune pickles callbacks with the sweep. A monitor is unpickled as the active monitor of the process.

    Args:
        folder: of the sweep. Trials that have already ended are shown, too.
        parent: MLflow run of the sweep.
        total: number of trials.
        tune: settings of the sweep.
    """

    current: ClassVar[Callback] = Callback()
    """The active monitor of this process; a callback without effect if there is none."""

    def __init__(self, folder: Path, parent: MlflowLogger, total: int, tune: TuneSettings) -> None:
        self.folder, self.parent, self.total, self.tune = folder, parent, total, tune
        self.started = time.monotonic()
        self.trials: dict[str, dict[str, Any]] = {}
        self.live: Live | None = None
        self.concurrent = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (Monitor, "current")

    def __enter__(self) -> "Monitor":
        for trial in read_trials(self.folder, self.tune):
            status, outcome = STATUS.get(trial.state, "FINISHED"), trial.state
            if trial.state == UNFINISHED:
                status, outcome = "KILLED", "its script was killed"
            else:
                result = trial.curve[-1] if trial.curve else {}
                self.trials[trial.trial_id] = {"point": trial.point, "state": trial.state, "result": result}
            parent = {PARENT: self.parent.run_id}  # another one, if the run of the sweep was deleted
            close_run(self.parent.uri, self._folder(trial.trial_id), status, outcome, self.parent.experiment, parent)
        Monitor.current = self
        if (console := Console()).is_terminal:
            self.live = Live(console=console, get_renderable=lambda: self.table(*console.size), refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(self, *unused: object) -> None:
        Monitor.current = Callback()
        if self.live:
            self.live.stop()

    def close(self) -> None:
        """Close the MLflow runs of running trials because the sweep is interrupted."""
        for name, trial in self.trials.items():
            if trial["state"] == RUNNING:
                close_run(self.parent.uri, self._folder(name), "KILLED", "killed")

    def stop_all(self) -> None:
        """End the running trials because the time limit is exceeded."""
        for name, trial in self.trials.items():
            if trial["state"] == RUNNING:
                where = _position(trial["result"]) if trial["result"] else "before its first evaluation"
                self._end(name, OUT_OF_TIME, f"after {self.tune.hours:g} hours (tune.hours), {where}")

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        """Raise OutOfTime if the time limit is exceeded."""
        if self.tune.hours and time.monotonic() - self.started >= 3600 * self.tune.hours:
            raise OutOfTime

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Record that a trial starts or resumes."""
        name, known = self._add(trial)
        self.trials[name]["state"] = RUNNING
        self.concurrent = max(self.concurrent, sum(trial["state"] == RUNNING for trial in self.trials.values()))
        if not load_outcome(self._folder(name)):
            self._print(name, "resumed" if known else "started")

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Prevent that Ray Tune retries a trial with a saved outcome: it would fail again."""
        if load_outcome(self._folder(self._add(trial)[0])):
            trial.run_metadata.num_failures = GIVE_UP

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        """Record an evaluation of a trial."""
        name, _ = self._add(trial)
        last = self.trials[name]["result"]
        if "step" in result and result["step"] > last.get("step", 0):  # a resumed trial reports old results again
            self.trials[name]["result"] = result
            self._print(name, progress_line(result))

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Record that a trial finished or was stopped."""
        name, _ = self._add(trial)
        result = self.trials[name]["result"]
        if not result:
            self._end(name, FAILED, "the trial ended before its first evaluation")
        elif result["step"] >= result["steps"]:
            self._end(name, FINISHED, "")
        elif result["out_of_patience"]:
            self._end(name, STOPPED_EARLY, f"train.patience is over, {_position(result)}")
        else:
            self._end(name, STOPPED, f"by ASHA at evaluation {result['evaluation']}, {_position(result)}")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Record that a trial failed."""
        error = None
        with suppress(EOFError):  # Ray has not finished writing the file
            error = trial.get_pickled_error()
        # Ray puts the name of the exception class before its message.
        reason = describe_failure(error or trial.get_error() or RuntimeError("its process died"))
        self._end(self._add(trial)[0], FAILED, reason.removeprefix("umbrella.base.UserError: "))

    def _add(self, trial: Any) -> tuple[str, bool]:
        """The name of a trial of Ray Tune, and whether it was known. A trial whose process cannot start is new."""
        name = trial_id_of(make_trial_folder(self.folder, trial.config))
        known = name in self.trials
        self.trials.setdefault(name, {"point": trial.config, "result": {}, "state": RUNNING})
        return name, known

    def _end(self, name: str, state: str, reason: str) -> None:
        save_outcome(self._folder(name), state, reason)
        outcome = load_outcome(self._folder(name))  # an earlier outcome has priority
        if outcome:
            state, reason = outcome
            self.trials[name]["state"] = state
            self._print(name, f"{state}: {reason}" if reason else state, f"  ({self._counts()})")
            close_run(self.parent.uri, self._folder(name), STATUS.get(state, "FINISHED"), state)

    def _folder(self, name: str) -> Path:
        return self.folder / TRIALS / name.rpartition("-")[2]

    def _print(self, name: str, message: str, counts: str = "") -> None:
        if not self.live:
            elapsed, trial = format_duration(time.monotonic() - self.started), format_point(self.trials[name]["point"])
            print(f"{elapsed}  {trial}: {printable(message)}{counts}", flush=True)

    def _counts(self) -> str:
        """Numbers of trials that ended, run and wait, and the estimated time left, in one line."""
        states = Counter(trial["state"] for trial in self.trials.values())
        ended, left = len(self.trials) - states[RUNNING], self._seconds_left(states[RUNNING])
        about = "" if left is None else f", about {format_duration(left)} left"
        pending = max(0, self.total - len(self.trials))
        return f"{ended} of {self.total} trials ended, {states[RUNNING]} running, {pending} pending{about}"

    def _seconds_left(self, running: int) -> float | None:
        """Estimate the time to the end: a trial that waits takes as long as the mean of those that ended.

        It is an upper bound where the scheduler stops trials that run. None before the first evaluation.
        """
        took, whole, left = [], [], []
        for trial in self.trials.values():
            if result := trial["result"]:
                seconds = result["time"] - result["begun"]
                if trial["state"] != RUNNING:
                    took.append(seconds)
                else:
                    first = result["begun_at_step"]  # of a resumed trial the steps before took no time
                    each = seconds / (result["step"] - first)
                    whole.append(each * result["steps"])
                    left.append(max(0.0, result["begun"] + each * (result["steps"] - first) - time.time()))
        if not (took or whole):
            return None
        waiting = max(0, self.total - len(self.trials)) + running - len(left)
        return max(*left, (sum(left) + waiting * fmean(took or whole)) / self.concurrent, 0.0)

    def table(self, width: int, height: int) -> Group:
        """The table for a terminal of this size, in characters: running trials, then those that ended, best first.

        Trials that do not fit are counted below.
        """

        def order(trial: dict[str, Any]) -> tuple[bool, tuple[float, float]]:
            result = trial["result"]
            return trial["state"] == RUNNING, ranking_key(result.get(metric), result.get(LOSS), self.tune.mode)

        metric, lines = self.tune.metric, max(1, height - TABLE_LINES)
        trials = sorted(self.trials.values(), key=order, reverse=True)
        results = [trial["result"] for trial in trials[:lines]]
        columns = {
            "state": [short_state(trial["state"]) for trial in trials[:lines]],
            "step": [f"{result['step']}/{result['steps']}" if result else "" for result in results],
        }
        columns |= {name: [f"{r[name]:.4g}" if name in r else "" for r in results] for name in (LOSS, metric)}
        title = f"{format_duration(time.monotonic() - self.started)}  {self._counts()}"
        hidden = [trial["state"] for trial in trials[lines:]]
        rest = [f"and {len(hidden)} more: {count_states(hidden)}"] if hidden else []
        return Group(title, trial_table([trial["point"] for trial in trials[:lines]], columns, width), *rest)


def _position(result: dict[str, Any]) -> str:
    return f"step {result['step']} of {result['steps']}"
