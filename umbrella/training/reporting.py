"""Log a training to MLflow and to the console. Only rank 0 does."""

import hashlib
import json
import socket
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import ray
import torch

from umbrella.data.masking import Redact
from umbrella.evaluation.predictions import Prediction, most_likely
from umbrella.paths import HISTORY, SETTINGS, checkpoint_folder
from umbrella.plots import curves
from umbrella.tracking.mlflow_logger import MlflowLogger
from umbrella.tracking.provenance import environment_json, headline_settings, read_salt, redact_subjects
from umbrella.training.checkpoint_files import (
    LOSS,
    NOT_EVALUATED,
    TrainingState,
    best_checkpoint,
    ranking_key,
    read_metrics,
)
from umbrella.training.progress_log import (
    BUILDING,
    FINISHED,
    FIRST,
    SECONDARY,
    STOPPED_EARLY,
    ProgressLog,
    Throughput,
    memory,
    progress_line,
)
from umbrella.training.task import Job, Task

PREDICTIONS = "predictions.json"
TABLE_TAG = {"mlflow.loggedArtifacts": json.dumps([{"path": PREDICTIONS, "type": "table"}])}
"""The tag that makes MLflow's page show the file as a table."""
COLUMNS = ("task_id", "task_type", "target", "subject", "truth", "chosen", "right", "probabilities", "nll_per_token")


class Reporter:
    """Logs one training to its run in MLflow, to the console and to Ray's gauges."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device, self.tune = job, device, job.settings.tune
        self.log = ProgressLog(str(job.tracking["name"]), str(job.tracking["trial"]), job.start_time)
        self.log.print_state(BUILDING)
        best = best_checkpoint(job.folder, self.tune.metric, self.tune.mode)
        self._best_key = self._ranking_key(read_metrics(best)) if best else NOT_EVALUATED
        self._salt = read_salt(job.settings.resources.storage) if job.settings.tracking.hash_subjects else ""

    def begin(self, plan: str, task: Task) -> None:
        """Start or continue the run in MLflow; log settings, data, machine, the text of the plan, and the summary."""
        job, device, summary = self.job, self.device, task.summary(self._redact)
        text = f"{plan}\n{summary.text}"
        self.tracker = MlflowLogger.start(**job.tracking, folder=job.folder)  # type: ignore[arg-type]
        self.tracker.params(headline_settings(job.settings, job.unused) | dict(job.data))
        name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
        machine = {"device": name, "host": socket.gethostname(), "ray.job": ray.get_runtime_context().get_job_id()}
        self.tracker.tags({**machine, **summary.tags})
        self.tracker.inputs(job.datasets)
        self.tracker.artifact(job.settings.to_yaml(), SETTINGS)
        self.tracker.artifact(environment_json(), "environment.json")
        self.tracker.artifact(text, "statement.txt")
        for file, content in summary.artifacts.items():
            self.tracker.artifact(content, file)
        self.tracker.watch_system()
        print(text, flush=True)
        self.log.print_state(FIRST)

    def step(self, values: Mapping[str, float], position: Mapping[str, float], throughput: Throughput) -> None:
        """Log the metrics of a step. ``position`` has step, steps and epoch."""
        self.tracker.metrics(values, int(position["step"]))
        left = self.log.seconds_left(position)
        if self.log.due:
            newest = {name: values[name] for name in ("train/loss", "train/lr")}
            self.log.update(newest | throughput.recent() | memory(self.device), {**position, "left": left})

    def evaluation(
        self, step: int, metrics: Mapping[str, float], report: Mapping[str, Any], predictions: Sequence[Prediction]
    ) -> None:
        """Log an evaluation, and send all steps before it to MLflow.

        Metrics ``best/...`` are those of the best evaluation, because MLflow's tables show the last value of a metric.
        ``SECONDARY`` metrics are only in evaluations.jsonl, which is logged at the end.
        """
        tracking, key = self.job.settings.tracking, self._ranking_key(metrics)
        is_best = key > self._best_key
        first = {name: metrics[name] for name in (self.tune.metric, LOSS) if name in metrics}
        best = {f"best/{name}": value for name, value in first.items() if is_best}
        others = {name: value for name, value in metrics.items() if not name.endswith(SECONDARY)}
        self.tracker.metrics({**best, **first, **others}, step)
        self.tracker.flush()
        self.log.update_evaluation({name: value for name, value in metrics.items() if name.startswith("eval/")})
        if is_best:
            self._best_key = key
            if tracking.predictions:
                self.tracker.artifact(predictions_json(predictions, tracking.predictions, self._redact), PREDICTIONS)
                self.tracker.tags(TABLE_TAG)
            if tracking.checkpoint != "none":
                self.tracker.tags({"best.checkpoint": str(checkpoint_folder(self.job.folder, step))})
        print(progress_line(report), flush=True)

    def end(self, state: TrainingState, position: Mapping[str, float]) -> None:
        """End the run of a training that finished its steps, or that stopped early because of ``train.patience``."""
        outcome, note = FINISHED, ""
        if position["step"] < position["steps"]:
            better = "a number" if state.best is None else f"better than {state.best:.4g}"
            evaluations = f"for {state.since_best} evaluations (train.patience)"
            where = f"at step {position['step']} of {position['steps']}"
            outcome, note = STOPPED_EARLY, f"{self.tune.metric} has not been {better} {evaluations}, {where}"
        self.tracker.flush()
        metric = self.tune.metric
        panels = {"loss": ["train/loss", "eval/loss"], metric: [metric], "rate": ["train/lr"]}
        if metric == LOSS:
            del panels[metric]
        lines = self.tracker.history(*chain.from_iterable(panels.values()))
        drawn = {panel: {name: lines[name] for name in names if name in lines} for panel, names in panels.items()}
        if drawn := {panel: of_panel for panel, of_panel in drawn.items() if of_panel}:
            self.tracker.artifact(curves(drawn, str(self.job.tracking["name"])), "curves.png")
        self.tracker.artifact((Path(self.job.folder) / HISTORY).read_bytes(), HISTORY)
        best = best_checkpoint(self.job.folder, self.tune.metric, self.tune.mode)
        if best and self.job.settings.tracking.checkpoint == "best":
            self.tracker.folder_artifact(best, "checkpoint")
        self.tracker.end(outcome=outcome)
        self.log.print_state(outcome, note)

    def _ranking_key(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        return ranking_key(metrics.get(self.tune.metric), metrics.get(LOSS), self.tune.mode)

    def _redact(self, text: str, subjects: Collection[str]) -> str:
        return redact_subjects(text, subjects, self._salt) if self._salt else text


def predictions_json(predictions: Sequence[Prediction], count: int, redact: Redact) -> str:
    """Return a table of ``count`` predictions, a random sample that is the same in every run on the same data.

    ``probabilities`` are those of the candidate answers; ``chosen`` is the most likely one, empty for a tie. Questions
    without candidates (numbers) only have ``nll_per_token``, of the true answer, in nats.

    Args:
        redact: applied to texts that name subjects.
    """
    sample = sorted(predictions, key=lambda p: hashlib.sha256(p.task_id.encode()).digest())[:count]
    rows = []
    for p in sorted(sample, key=lambda p: p.task_id):
        chosen = most_likely(p.probabilities)
        row = (
            redact(p.task_id, p.subjects),
            p.task_type,
            p.target,
            redact(p.subject_id, [p.subject_id]),
            p.label,
            chosen,
            chosen == p.label if p.probabilities else None,
            {label: round(probability, 4) for label, probability in p.probabilities.items()},
            None if p.nll_per_token is None else round(p.nll_per_token, 4),
        )
        rows.append(row)
    return json.dumps({"columns": COLUMNS, "data": rows})
