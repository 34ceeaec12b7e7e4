"""Log a training to MLflow and to the console. Only rank 0 does."""

import socket
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray
import torch

from umbrella.evaluation.predictions import Prediction
from umbrella.paths import SETTINGS, checkpoint_folder
from umbrella.plots import curves
from umbrella.tracking.mlflow_logger import MlflowLogger
from umbrella.tracking.provenance import environment_json
from umbrella.tracking.redaction import hide, read_salt
from umbrella.training.checkpoint_files import Best, Progress, best_checkpoint
from umbrella.training.job import Job
from umbrella.training.predictions import FILE, SHOWN_AS, predictions_json
from umbrella.training.progress_log import BUILDING, EARLY, FINISHED, FIRST, ProgressLog, progress_line
from umbrella.training.task import Task
from umbrella.training.throughput import Pace, memory


class Reporter:
    """One training's run in MLflow, and its progress."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.log = ProgressLog(str(job.tracking["name"]), str(job.tracking["trial"]), job.begun)
        self.log.say(BUILDING)
        self._best = Best.of(job.folder, job.settings.tune.metric, job.settings.tune.mode)
        self._salt = read_salt(job.settings.resources.storage) if job.settings.tracking.hash_subjects else ""

    def begin(self, plan: str, task: Task) -> None:
        """Open the run with the summary of the training.

        Args:
            plan: in words.
        """
        summary = task.summary(self._hidden)
        text = f"{plan}\n{summary.text}"
        self.tracker = open_run(self.job, self.device, summary.tags)
        self.tracker.text(text, "statement.txt")
        for file, content in summary.artifacts.items():
            self.tracker.text(content, file)
        self.tracker.watch_system()
        print(text, flush=True)
        self.log.say(FIRST)

    def step(self, values: Mapping[str, float], place: Mapping[str, float], pace: Pace) -> None:
        """Log the metrics of a step. ``place``: step, steps and epoch."""
        self.tracker.metrics(values, int(place["step"]))
        left = self.log.seconds_left(place)
        if self.log.due:
            newest = {name: values[name] for name in ("train/loss", "train/lr")}
            self.log.figures(newest | pace.recent() | memory(self.device), {**place, "left": left})

    def evaluation(
        self, step: int, measured: Mapping[str, float], report: Mapping[str, Any], scored: Sequence[Prediction]
    ) -> None:
        """Write down an evaluation, and with it all steps before. ``scored``: the validation split."""
        tracking, best = self.job.settings.tracking, self._best.news(measured)
        self.tracker.metrics({**measured, **best}, step)
        self.tracker.flush()
        self.log.evaluation({name: value for name, value in measured.items() if name.startswith("eval/")})
        if best:
            if tracking.predictions:
                self.tracker.text(predictions_json(scored, tracking.predictions, self._hidden), FILE)
                self.tracker.tags(SHOWN_AS)
            if tracking.checkpoint != "none":
                self.tracker.tags({"best.checkpoint": str(checkpoint_folder(self.job.folder, step))})
        print(progress_line(dict(report)), flush=True)

    def _hidden(self, text: str, subjects: Collection[str]) -> str:
        return hide(text, subjects, self._salt) if self._salt else text

    def end(self, progress: Progress, place: Mapping[str, float]) -> None:
        """The training ended by itself: at its last step, or before it for want of a better evaluation."""
        outcome, note = FINISHED, ""
        if place["step"] < place["steps"]:
            better = "a number" if progress.best is None else f"better than {progress.best:.4g}"
            so_long = f"for {progress.since_best} evaluations (train.patience)"
            where = f"at step {place['step']} of {place['steps']}"
            outcome, note = EARLY, f"{self.job.settings.tune.metric} has not been {better} {so_long}, {where}"
        self._picture()
        tune = self.job.settings.tune
        best = best_checkpoint(self.job.folder, tune.metric, tune.mode)
        if best and self.job.settings.tracking.checkpoint == "best":
            self.tracker.folder_artifact(best, "checkpoint")
        self.tracker.end(outcome=outcome)
        self.log.say(outcome, note)

    def _picture(self) -> None:
        """The curves of the whole training."""
        self.tracker.flush()
        metric = self.job.settings.tune.metric
        panels = {
            "loss": ["train/loss", "eval/loss"],
            metric: [] if metric == "eval/loss" else [metric],
            "rate": ["train/lr"],
        }
        lines = self.tracker.history(*(name for names in panels.values() for name in names))
        drawn = {panel: {name: lines[name] for name in names if name in lines} for panel, names in panels.items()}
        if drawn := {panel: curve for panel, curve in drawn.items() if curve}:
            self.tracker.save(curves(drawn, str(self.job.tracking["name"])), "curves.png")


def open_run(job: Job, device: torch.device, tags: Mapping[str, str]) -> MlflowLogger:
    """Begin or continue a training's run in MLflow and log settings, data and machine. ``tags``: of this training."""
    tracker = MlflowLogger.start(**job.tracking, folder=job.folder)  # type: ignore[arg-type]
    flat = {name: value for name, value in job.settings.flat().items() if name.split(".")[0] not in job.unused}
    tracker.params(flat | dict(job.data))
    told = {"device": _device_name(device), "host": socket.gethostname()}
    tracker.tags(told | {"ray.job": ray.get_runtime_context().get_job_id(), **tags})
    tracker.inputs(job.datasets)
    tracker.text(job.settings.to_yaml(), SETTINGS)
    tracker.text(environment_json(), "environment.json")
    return tracker


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
