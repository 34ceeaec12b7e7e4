"""Log a training to MLflow and to the console. Only rank 0 does."""

import hashlib
import json
import socket
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from umbrella.data.mask_audit import Hide
from umbrella.evaluation.predictions import Prediction, most_likely
from umbrella.paths import SETTINGS, checkpoint_folder
from umbrella.plots import curves
from umbrella.tracking.mlflow_logger import MlflowLogger
from umbrella.tracking.provenance import environment_json
from umbrella.tracking.redaction import read_salt, redact_subjects
from umbrella.training.checkpoint_files import best_checkpoint, read_metrics
from umbrella.training.job import Job
from umbrella.training.progress_log import BUILDING, FINISHED, FIRST, STOPPED_EARLY, ProgressLog, progress_line
from umbrella.training.task import Task
from umbrella.training.throughput import Throughput, memory
from umbrella.training.training_state import LOSS, NOT_EVALUATED, TrainingState, ranking_key

PREDICTIONS = "predictions.json"
SHOWN_AS_TABLE = {"mlflow.loggedArtifacts": json.dumps([{"path": PREDICTIONS, "type": "table"}])}
"""The tag by which MLflow's page knows the file for a table."""
COLUMNS = ("task_id", "task_type", "target", "subject", "truth", "chosen", "right", "probabilities", "nll_per_token")


class Reporter:
    """One training's run in MLflow, and its progress."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.log = ProgressLog(str(job.tracking["name"]), str(job.tracking["trial"]), job.start_time)
        self.log.say(BUILDING)
        self._best = BestEvaluation.of(job.folder, job.settings.tune.metric, job.settings.tune.mode)
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

    def step(self, values: Mapping[str, float], place: Mapping[str, float], pace: Throughput) -> None:
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
                self.tracker.text(predictions_json(scored, tracking.predictions, self._hidden), PREDICTIONS)
                self.tracker.tags(SHOWN_AS_TABLE)
            if tracking.checkpoint != "none":
                self.tracker.tags({"best.checkpoint": str(checkpoint_folder(self.job.folder, step))})
        print(progress_line(dict(report)), flush=True)

    def _hidden(self, text: str, subjects: Collection[str]) -> str:
        return redact_subjects(text, subjects, self._salt) if self._salt else text

    def end(self, progress: TrainingState, place: Mapping[str, float]) -> None:
        """The training ended by itself: at its last step, or before it for want of a better evaluation."""
        outcome, note = FINISHED, ""
        if place["step"] < place["steps"]:
            better = "a number" if progress.best is None else f"better than {progress.best:.4g}"
            so_long = f"for {progress.since_best} evaluations (train.patience)"
            where = f"at step {place['step']} of {place['steps']}"
            outcome, note = STOPPED_EARLY, f"{self.job.settings.tune.metric} has not been {better} {so_long}, {where}"
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


class BestEvaluation:
    """The best evaluation so far, by its ``ranking_key``."""

    def __init__(self, metric: str, mode: str) -> None:
        self.metric, self.mode = metric, mode
        self._good = NOT_EVALUATED

    @classmethod
    def of(cls, training: str | Path, metric: str, mode: str) -> "BestEvaluation":
        """That of a training's best checkpoint."""
        best, checkpoint = cls(metric, mode), best_checkpoint(training, metric, mode)
        if checkpoint:
            best.news(read_metrics(checkpoint))
        return best

    def news(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics ``best/...`` of an evaluation that is better than all before; empty for another one.

        MLflow's tables and pages know a metric by its last value, and what is kept is the best checkpoint.
        """
        good = ranking_key(metrics.get(self.metric), metrics.get(LOSS), self.mode)
        if good <= self._good:
            return {}
        self._good = good
        return {f"best/{name}": metrics[name] for name in (self.metric, LOSS) if name in metrics}


def predictions_json(scored: Sequence[Prediction], count: int, hide: Hide) -> str:
    """A table of so many questions, of all of them by chance but the same in every run on the same data.

    ``probabilities`` are of the candidate answers; ``chosen`` is the most likely one, nothing where two are equally so.
    Questions without candidates (numbers) have ``nll_per_token`` alone: nats per token of the true answer.

    Args:
        hide: applied to what names subjects.
    """
    drawn = sorted(scored, key=lambda s: hashlib.sha256(s.task_id.encode()).digest())[:count]
    rows = []
    for s in sorted(drawn, key=lambda s: s.task_id):
        chosen = most_likely(s.probabilities)
        values = (
            hide(s.task_id, s.subjects),
            s.task_type,
            s.target,
            hide(s.subject_id, [s.subject_id]),
            s.label,
            chosen,
            chosen == s.label if s.probabilities else None,
            {label: round(p, 4) for label, p in s.probabilities.items()},
            None if s.nll_per_token is None else round(s.nll_per_token, 4),
        )
        rows.append(values)
    return json.dumps({"columns": COLUMNS, "data": rows})
