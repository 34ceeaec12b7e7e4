"""What the folder of a sweep keeps: its specification, the folder of each trial, and how each trial ended."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from umbrella.base import UserError
from umbrella.config import Settings, load_settings
from umbrella.fileio import write_atomic
from umbrella.html import relative_link
from umbrella.paths import CHECKPOINT, END, FINGERPRINT, GIVEN, POINT, REPORT, SETTINGS, TRIALS, storage_of
from umbrella.tracking.mlflow_logger import run_key
from umbrella.tuning.search_space import format_point, format_value, is_fixed
from umbrella.version import check_version, write_version

STOPPED, FAILED, OUT_OF_TIME = "stopped by the scheduler", "failed", "out of time"
"""States of trials that did not end by themselves; ``progress_log`` has the others."""
UNFINISHED = "not finished"
"""The state of a trial without an outcome."""


class SweepSpec(NamedTuple):
    """The specification of a sweep. ``fixed``: names set on the command line; they are not swept."""

    settings: Settings
    fixed: frozenset[str]


def save_spec(folder: Path, spec: SweepSpec, fingerprint: str) -> None:
    """Save the specification of a sweep and the fingerprint of its data.

    The settings are written last: a folder with settings is complete.
    """
    run_key(folder)  # creates the key of the MLflow run, which other machines download with the folder
    write_version(folder)
    (folder / GIVEN).write_text(json.dumps(sorted(spec.fixed)), encoding="utf-8")
    (folder / FINGERPRINT).write_text(json.dumps(fingerprint), encoding="utf-8")
    write_atomic(folder / SETTINGS, spec.settings.to_yaml())


def load_spec(folder: Path, files: Sequence[str] = (), overrides: Mapping[str, Any] | None = None) -> SweepSpec:
    """Load the specification of a sweep that is resumed, with new values of ``resources``.

    Its storage is the present location of the folder.

    Args:
        files: YAML files of settings on the command line.
        overrides: other settings on the command line, by dotted name.

    Raises:
        UserError: an incompatible version of UMBRELLA wrote it; or files or overrides change settings other than
            ``resources``.
    """
    check_version(folder)
    fixed = frozenset(json.loads((folder / GIVEN).read_text(encoding="utf-8")))
    given, storage = overrides or {}, {"resources.storage": str(storage_of(folder))}
    settings = load_settings([folder / SETTINGS], storage)
    resumed = load_settings([folder / SETTINGS, *files], {**given, **storage})
    old, new = settings.flat(), resumed.flat()
    swept = [name for name in settings.tune.space if not is_fixed(name, fixed)]
    changed = {name: "is swept" for name in given if any(is_fixed(other, {name}) for other in swept)}
    for name in {**old, **new}:
        if old.get(name) != new.get(name) and not name.startswith("resources."):
            was, now = (format_value(flat[name]) if name in flat else "unset" for flat in (old, new))
            changed[name] = f"was {was}, is {now}"
    if changed:
        listed = ", ".join(f"{name} ({why})" for name, why in sorted(changed.items()))
        raise UserError(f"--resume uses the settings of the sweep; leave out {listed}, or start a new sweep")
    return SweepSpec(resumed, fixed)


def check_fingerprint(folder: Path, fingerprint: str) -> None:
    """Check that the data are those that the sweep was started with.

    Raises:
        UserError: they are not.
    """
    old = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))
    if old != fingerprint:
        raise UserError(
            f"--resume: {folder.name} was started with other data ({old[:12]}, now {fingerprint[:12]}); start another"
        )


def make_trial_folder(sweep: str | Path, point: Mapping[str, Any]) -> Path:
    """The folder of the trial with the values of a point; it is created if it does not exist.

    It is named by the point, so that a trial to which Ray Tune gives a new id finds its folder again.
    """
    folder = Path(sweep) / TRIALS / sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:10]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / POINT).exists():
        write_atomic(folder / POINT, json.dumps(point))
    return folder


def trial_id_of(folder: str | Path) -> str:
    """The id of a trial, unique among all sweeps. A tag of its MLflow run holds it."""
    folder = Path(folder)
    return f"{folder.parent.parent.name}-{folder.name}"


def describe_trial(model: str, folder: Path) -> dict[str, Any]:
    """Return the fields ``name`` and ``links`` of the ``EvaluationResult`` of a trial; nothing for other models.

    Args:
        model: path of a checkpoint.
        folder: of the evaluation.
    """
    checkpoint = Path(model)
    trial, sweep = checkpoint.parent, checkpoint.parent.parent.parent
    if not (trial / POINT).exists():
        return {}
    point = json.loads((trial / POINT).read_text(encoding="utf-8"))
    targets = {"checkpoint": checkpoint, "report of the sweep": sweep / REPORT}
    links = {words: relative_link(target, folder) for words, target in targets.items() if target.exists()}
    step = int(checkpoint.name.removeprefix(CHECKPOINT))
    return {"name": f"{sweep.name}, {format_point(point)}, step {step}", "links": links}


class TrialOutcome(NamedTuple):
    """How a trial ended.

    ``state``: FINISHED, STOPPED_EARLY, STOPPED, OUT_OF_TIME or FAILED. ``reason``: the cause, in one line.
    """

    state: str
    reason: str


def save_outcome(folder: str | Path, state: str, reason: str = "") -> None:
    """Save how a trial ended, unless its folder already has an outcome."""
    file = Path(folder) / END
    if file.parent.is_dir() and not file.exists():
        write_atomic(file, json.dumps({"state": state, "reason": reason}))


def load_outcome(folder: str | Path) -> TrialOutcome | None:
    """How a trial ended; None if it has not ended."""
    file = Path(folder) / END
    return TrialOutcome(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def allow_retry(folder: str | Path) -> None:
    """Delete the outcome of a trial that failed or ran out of time, so that it is resumed."""
    outcome = load_outcome(folder)
    if outcome and outcome.state in (FAILED, OUT_OF_TIME):
        (Path(folder) / END).unlink()
