"""A trial's folder: which one it is, and its name."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from umbrella.paths import POINT, TRIALS
from umbrella.storage import put_text


def find_folder(sweep: str | Path, ray_id: str, point: Mapping[str, Any]) -> Path:
    """Where a trial's training lies, or would.

    Args:
        ray_id: as Ray Tune knows the trial.
        point: the trial's, where Ray's id is new. The folder is named by that, so that a lost note of
            Ray's is no loss.
    """
    trials = Path(sweep) / TRIALS
    known = trials / f"{ray_id}.txt"
    return trials / (known.read_text(encoding="utf-8") if known.exists() else _name(point))


def trial_folder(sweep: str | Path, ray_id: str, point: Mapping[str, Any]) -> Path:
    """``find_folder``, and made if need be."""
    folder = find_folder(sweep, ray_id, point)
    known = folder.with_name(f"{ray_id}.txt")
    folder.mkdir(parents=True, exist_ok=True)
    if not known.exists():
        put_text(known, folder.name)
    if not (folder / POINT).exists():
        put_text(folder / POINT, json.dumps(point))
    return folder


def read_point(folder: str | Path) -> dict[str, Any]:
    """A trial's point."""
    return json.loads((Path(folder) / POINT).read_text(encoding="utf-8"))


def name_of(folder: str | Path) -> str:
    """A trial's name among all sweeps, which its run in MLflow is tagged with."""
    folder = Path(folder)
    return f"{folder.parent.parent.name}-{folder.name}"


def _name(point: Mapping[str, Any]) -> str:
    return sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:10]
