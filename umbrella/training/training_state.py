"""Every evaluation of a training, a line each in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umbrella.paths import HISTORY
from umbrella.storage import put_text


def note(folder: str | Path, report: Mapping[str, Any]) -> None:
    """Add an evaluation: step, steps, epoch, out_of_patience, and what was measured."""
    with (Path(folder) / HISTORY).open("a", encoding="utf-8") as file:
        print(json.dumps(report), file=file, flush=True)


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The evaluations by step; of a step that was done again, the last. A line that is half written is none yet."""
    file = Path(folder) / HISTORY
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n") and line.startswith("{")]
    return sorted({row["step"]: row for row in rows}.values(), key=lambda row: row["step"])


def cut(folder: str | Path, step: int) -> None:
    """Forget evaluations after a step: the training goes on from there, and will do them again."""
    file = Path(folder) / HISTORY
    if file.exists():
        kept = [row for row in read_history(folder) if row["step"] <= step]
        put_text(file, "".join(f"{json.dumps(row)}\n" for row in kept))
