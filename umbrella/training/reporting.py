"""What a training says of itself, in MLflow and in its log. Rank 0 alone does."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
import torch
from torch import nn

from umbrella.data.audit import audit
from umbrella.data.pipeline import from_table
from umbrella.data.rendering import Renderer
from umbrella.tracking.runs import Tracker
from umbrella.training.job import Job, progress_line
from umbrella.training.live import BUILDING, EARLY, EVALUATING, FINISHED, FIRST, Live
from umbrella.training.pace import Pace, memory
from umbrella.training.progress import Progress
from umbrella.training.statement import audited, mask_page, share, statement
from umbrella.training.step import StepResult


class Reporter:
    """One training's run in MLflow, and what it does at this moment."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.live = Live(job.folder, str(job.tracking["name"]), str(job.tracking["trial"]))
        self.live.say(BUILDING)
        self._first: tuple[float, float] | None = None

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
        self.tracker = Tracker.start(**job.tracking)  # type: ignore[arg-type]
        flat = {name: value for name, value in settings.flat().items() if not name.startswith("tune.")}
        self.tracker.params(flat | dict(job.data))
        self.tracker.tags({"device": str(self.device), "ray.job": ray.get_runtime_context().get_job_id()})
        self.tracker.text(settings.to_yaml(), "settings.yaml")
        self.tracker.text(text, "statement.txt")
        self.tracker.text(mask_page(rows, examples, renderer, settings.mask, read), "mask_audit.html")
        supervised, tokens = (sum(int(row[name]) for row in rows) for name in ("supervised", "tokens"))
        self.tracker.tags({"mask.supervised": f"{supervised} of {tokens} tokens audited"})
        self.tracker.watch_system()
        print(text, flush=True)
        self.live.say(FIRST)

    def step(self, result: StepResult, place: Mapping[str, float], pace: Pace) -> None:
        """Note what a step did. ``place``: step, steps and epoch."""
        values = {"train/loss": result.loss, "train/lr": result.lr, "train/grad_norm": result.grad_norm}
        values |= {f"train/grad_norm/{part}": norm for part, norm in result.grad_norm_by_part.items()}
        values |= {f"train/lr/{group}": lr for group, lr in result.lr_by_group.items()}
        values["train/supervised_tokens"] = result.supervised_tokens
        now, step = time.monotonic(), place["step"]
        self.tracker.metrics(values, int(step))
        # Time is counted from the end of the first step: what goes before, as compilation, comes once.
        began, first = self._first = self._first or (now, step)
        if step == first or self.live.due:
            left = (now - began) / (step - first) * (place["steps"] - step) if step > first else None
            newest = {"train/loss": result.loss, "train/lr": result.lr, **pace.recent(), **memory(self.device)}
            self.live.figures(newest, {**place, "left": left})

    def evaluating(self, place: Mapping[str, float]) -> None:
        """An evaluation begins."""
        self.live.say(EVALUATING, place)

    def evaluation(self, step: int, measured: Mapping[str, float], report: Mapping[str, Any]) -> None:
        """Write down an evaluation, and with it all steps before."""
        self.tracker.metrics(measured, step)
        self.tracker.flush()
        self.live.evaluation({name: value for name, value in measured.items() if name.startswith("eval/")})
        print(progress_line(dict(report)), flush=True)

    def end(self, progress: Progress, place: Mapping[str, float]) -> None:
        """The training ended by itself: at its last step, or before it for want of a better evaluation."""
        outcome, note = FINISHED, ""
        if place["step"] < place["steps"]:
            better = "a number" if progress.best is None else f"better than {progress.best:.4g}"
            so_long = f"for {progress.since_best} evaluations (train.patience)"
            where = f"at step {place['step']} of {place['steps']}"
            outcome, note = EARLY, f"{self.job.settings.tune.metric} has not been {better} {so_long}, {where}"
        self.tracker.end(outcome=outcome)
        self.live.say(outcome, {**place, "left": None}, note)


class _Lazy(Sequence):
    """A table's conversations as a sequence that parses only what is asked for."""

    def __init__(self, size: int, get: Callable[[int], Any]) -> None:
        self.size, self.get = size, get

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return self.get(range(self.size)[index])
