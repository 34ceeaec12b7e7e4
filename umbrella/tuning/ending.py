"""How a trial ended, kept in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from umbrella.paths import END
from umbrella.storage import put_text
from umbrella.training.progress_log import EARLY, FINISHED

STOPPED, FAILED, BUDGET = "stopped by the scheduler", "failed", "out of time"
"""How a trial ends that did not end by itself; see ``progress_log`` for the others."""
UNFINISHED = "not finished"


class End(NamedTuple):
    """``state``: FINISHED, EARLY, STOPPED, BUDGET or FAILED. ``reason``: why, in one line."""

    state: str
    reason: str


def write_end(folder: str | Path, state: str, reason: str = "") -> None:
    """Keep how a trial ended. What was kept before stays."""
    file = Path(folder) / END
    if file.parent.is_dir() and not file.exists():
        put_text(file, json.dumps({"state": state, "reason": reason}))


def read_end(folder: str | Path) -> End | None:
    """How a trial ended, or nothing: it did not yet."""
    file = Path(folder) / END
    return End(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def reopen(folder: str | Path) -> None:
    """Let a trial that failed, or that time ran out for, go on."""
    end = read_end(folder)
    if end and end.state in (FAILED, BUDGET):
        (Path(folder) / END).unlink()


def how_it_ended(report: Mapping[str, Any]) -> str:
    """The end of a trial that nothing went wrong with, from its last report: FINISHED, EARLY or STOPPED."""
    if report["step"] >= report["steps"]:
        return FINISHED
    return EARLY if report["out_of_patience"] else STOPPED
