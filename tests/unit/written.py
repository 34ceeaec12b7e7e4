"""What a training writes into its folder, for tests of what reads it there, without a training."""

import json
from pathlib import Path
from typing import Any

from umbrella.paths import BEGUN, METRICS, PROGRESS, checkpoint_folder
from umbrella.training.checkpoint_files import delete_checkpoint, mark_complete

FIRST = "trainings/first"


def all_of(things: Any, what: str) -> Any:
    return things


def begin(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / BEGUN).write_text("{}", encoding="utf-8")
    return folder


def evaluate(folder: Path, step: int, writing: str = "a") -> Path:
    """What a training writes at an evaluation. ``writing``: stands in the checkpoint's files."""
    with (folder / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        print(json.dumps({"step": step}), file=file)
    partial = folder / f".step_{step}.partial"
    (partial / "adapter").mkdir(parents=True)
    for name in ("model.safetensors", "adapter/config", "state.pt"):
        (partial / name).write_text(f"{step} {writing}", encoding="utf-8")
    (partial / METRICS).write_text('{"eval/loss": 1}', encoding="utf-8")
    (partial / PROGRESS).write_text(json.dumps({"step": step}), encoding="utf-8")
    mark_complete(partial)
    checkpoint = checkpoint_folder(folder, step)
    if checkpoint.exists():
        delete_checkpoint(checkpoint)
    return partial.rename(checkpoint)
