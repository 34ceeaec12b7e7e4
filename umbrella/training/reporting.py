"""What a training says of itself, in MLflow and in its log. Rank 0 alone does."""

import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
import torch
from torch import nn

from umbrella.data.audit import audit
from umbrella.data.pipeline import from_table
from umbrella.data.rendering import Renderer
from umbrella.evaluation.prediction import Prediction
from umbrella.tracking.environment import environment_json
from umbrella.tracking.figures import curves
from umbrella.tracking.mlflow_logger import MlflowLogger
from umbrella.tracking.privacy import hide, read_salt
from umbrella.training.job import AnyJob, Job, progress_line
from umbrella.training.pace import Pace, memory
from umbrella.training.predictions import FILE, SHOWN_AS, predictions_json
from umbrella.training.progress import Best, Progress, best_checkpoint, checkpoint_folder
from umbrella.training.progress_log import BUILDING, EARLY, FINISHED, FIRST, ProgressLog
from umbrella.training.statement import audited, mask_page, share, statement
from umbrella.training.step import StepResult


class Reporter:
    """One training's run in MLflow, and its progress."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.log = ProgressLog(str(job.tracking["name"]), str(job.tracking["trial"]), job.begun)
        self.log.say(BUILDING)
        self._best = Best.of(job.folder, job.settings.tune.metric, job.settings.tune.mode)
        self._salt = read_salt(job.settings.resources.storage) if job.settings.tracking.hash_subjects else ""

    def begin(
        self, in_words: str, table: pa.Table, renderer: Renderer, parts: Mapping[str, Sequence[nn.Parameter]]
    ) -> None:
        """Open the run with all that says what this training is.

        Args:
            table: the training conversations, see ``data.pipeline.to_table``.
            parts: see ``model.selection.parts``.
        """
        job = self.job
        settings = job.settings
        conversations = _Lazy(table.num_rows, lambda i: from_table(table, i))
        examples = audited(conversations, renderer)
        rows, read = audit(examples, settings.mask), share(examples, conversations)
        moving = {name: sum(w.numel() for w in ws if w.requires_grad) for name, ws in parts.items()}
        told = statement(rows, settings.mask, moving, settings.modalities, renderer.stops, read)
        text = f"{in_words}\n{told}"
        supervised, tokens = (sum(int(row[name]) for row in rows) for name in ("supervised", "tokens"))
        tags = {"mask.supervised": f"{supervised} of {tokens} tokens audited"}
        self.tracker = open_run(job, self.device, tags)
        self.tracker.text(text, "statement.txt")
        page = mask_page(rows, examples, renderer, settings.mask, read, self._hidden)
        self.tracker.text(page, "mask_audit.html")
        self.tracker.watch_system()
        print(text, flush=True)
        self.log.say(FIRST)

    def step(self, result: StepResult, place: Mapping[str, float], pace: Pace) -> None:
        """Note what a step did. ``place``: step, steps and epoch."""
        values = {"train/loss": result.loss, "train/lr": result.lr, "train/grad_norm": result.grad_norm}
        values |= {f"train/grad_norm/{part}": norm for part, norm in result.grad_norm_by_part.items()}
        values |= {f"train/lr/{group}": lr for group, lr in result.lr_by_group.items()}
        values["train/supervised_tokens"] = result.supervised_tokens
        self.tracker.metrics(values, int(place["step"]))
        left = self.log.seconds_left(place)
        if self.log.due:
            newest = {"train/loss": result.loss, "train/lr": result.lr, **pace.recent(), **memory(self.device)}
            self.log.figures(newest, {**place, "left": left})

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
            "loss (nats/token)": ["train/loss", "eval/loss"],
            metric: [] if metric == "eval/loss" else [metric],
            "rate": ["train/lr"],
        }
        lines = self.tracker.history(*(name for names in panels.values() for name in names))
        drawn = {panel: {name: lines[name] for name in names if name in lines} for panel, names in panels.items()}
        if drawn := {panel: curve for panel, curve in drawn.items() if curve}:
            self.tracker.save(curves(drawn, str(self.job.tracking["name"])), "curves.png")


def open_run(job: AnyJob, device: torch.device, tags: Mapping[str, str]) -> MlflowLogger:
    """Begin or continue a training's run in MLflow and log settings, data and machine. ``tags``: of this training."""
    tracker = MlflowLogger.start(**job.tracking, folder=job.folder)  # type: ignore[arg-type]
    flat = {name: value for name, value in job.settings.flat().items() if name.split(".")[0] not in job.idle}
    tracker.params(flat | dict(job.data))
    told = {"device": _device_name(device), "host": socket.gethostname()}
    tracker.tags(told | {"ray.job": ray.get_runtime_context().get_job_id(), **tags})
    tracker.inputs(job.datasets)
    tracker.text(job.settings.to_yaml(), "settings.yaml")
    tracker.text(environment_json(), "environment.json")
    return tracker


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


class _Lazy(Sequence):
    """A table's conversations as a sequence that parses only what is asked for."""

    def __init__(self, size: int, get: Callable[[int], Any]) -> None:
        self.size, self.get = size, get

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return self.get(range(self.size)[index])
