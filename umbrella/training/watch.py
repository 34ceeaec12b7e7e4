"""A plain training as a person sees it: a bar that moves in a terminal, a line now and then elsewhere."""

import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from umbrella.training.live import EVALUATING, STARTING, TRAINING, live_file, read_live

LOOK, LINE = 0.25, 30.0
"""Seconds between two looks at the training, and between two lines where there is no terminal."""


class Watch:
    """Follows a training from the process that started it, while the ``with`` block lasts."""

    def __init__(self, folder: str | Path, console: Console | None = None) -> None:
        self.folder, self.console = folder, console or Console()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._began = self._last_line = time.monotonic()
        self._seen: dict[str, Any] = {}
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        ends = (TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
        # Lines that Ray prints from the workers go through the console, above the bar.
        self._bar = _Bar(*columns, *ends, console=self.console) if self.console.is_terminal else None
        self._task = self._bar.add_task(STARTING, total=None, left="") if self._bar else None

    def __enter__(self) -> "Watch":
        live_file(self.folder).unlink(missing_ok=True)  # an earlier attempt's
        if self._bar:
            self._bar.start()
        else:
            self._print(STARTING)
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._bar:
            self._bar.stop()

    def _follow(self) -> None:
        while not self._ended.wait(LOOK):
            self._look()
        self._look()

    def _look(self) -> None:
        told = read_live(self.folder)
        if not told or told == self._seen:
            return
        before, self._seen = self._seen.get("state", STARTING), told
        if self._bar is not None and self._task is not None:
            self._bar.figures = figures(told)
            left = f"{clock(told['left'])} left" if told.get("left") else ""
            self._bar.update(
                self._task, description=told["state"], completed=told.get("step", 0), total=told.get("steps"), left=left
            )
            if told["note"] and told["state"] != before:
                self._bar.console.print(f"{told['state']}: {told['note']}", markup=False, highlight=False)
        elif told["state"] not in (before, TRAINING, EVALUATING):
            self._print(": ".join(filter(None, (told["state"], told["note"]))))
        elif told["state"] == TRAINING and time.monotonic() - self._last_line > LINE:
            self._print(line(told))

    def _print(self, words: str) -> None:
        self._last_line = time.monotonic()
        print(f"{clock(self._last_line - self._began)}  {words}", flush=True)


class _Bar(Progress):
    figures = ""

    def get_renderables(self) -> Any:
        """The bar, and the figures below it."""
        lines: list[RenderableType] = [self.make_tasks_table(self.tasks)]
        yield from [*lines, Text(self.figures)] if self.figures else lines


def figures(told: dict[str, Any]) -> str:
    """The figures of a training in words; see ``live.read_live``."""
    metrics = told.get("metrics", {})
    forms = {
        "train/loss": "loss {:.4g}",
        "train/lr": "rate {:.3g}",
        "train/samples_per_second": "{:.3g} samples/s",
        "train/supervised_tokens_per_second": "{:.0f} supervised tokens/s",
        "train/waiting_for_data": "waiting for data {:.0%}",
        "train/memory_device_mib": "GPU peak {:.0f} MiB",
        "train/memory_host_mib": "host {:.0f} MiB",
    }
    return "  ".join(form.format(metrics[name]) for name, form in forms.items() if name in metrics)


def line(told: dict[str, Any]) -> str:
    """How far a training is and its figures, as one line."""
    left = f"  {clock(told['left'])} left" if told.get("left") else ""
    return f"step {told['step']}/{told['steps']}  epoch {told['epoch']:.2f}  {figures(told)}{left}"


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes:02d}:{rest:02d}"
