"""What the folder of a sweep keeps: its specification, the folder of each trial, and how each trial ended."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from umbrella.base import UserError
from umbrella.config import Settings, load_settings
from umbrella.fileio import write_atomic
from umbrella.paths import END, FINGERPRINT, GIVEN, POINT, SETTINGS, TRIALS, storage_of, sweep_folder
from umbrella.tracking.mlflow_logger import run_key
from umbrella.training.progress_log import EARLY, FINISHED
from umbrella.tuning.parameter import format_value
from umbrella.tuning.search_space import is_fixed
from umbrella.version import check_version, write_version


class SweepSpec(NamedTuple):
    """``fixed``: names set on the command line, which are not swept."""

    settings: Settings
    fixed: frozenset[str]


def save_spec(folder: Path, question: SweepSpec, fingerprint: str) -> None:
    """Keep what a sweep asks, and of which data. Settings come last: with them the question is whole."""
    run_key(folder)  # a machine that downloads the folder needs the key of its run
    write_version(folder)
    (folder / GIVEN).write_text(json.dumps(sorted(question.fixed)), encoding="utf-8")
    (folder / FINGERPRINT).write_text(json.dumps(fingerprint), encoding="utf-8")
    write_atomic(folder / SETTINGS, question.settings.to_yaml())


def load_spec(folder: Path) -> SweepSpec:
    """What a sweep was begun with; its storage is where it lies now.

    Raises:
        UserError: there is no such sweep; names those that there are. A version that is too old began it.
    """
    if not (folder / SETTINGS).is_file():
        there = sorted(path.parent.name for path in folder.parent.glob(f"*/{SETTINGS}"))
        raise UserError(
            f"--resume: there is no sweep {folder}; {'there are ' + ', '.join(there) if there else 'none is'}"
        )
    check_version(folder)
    settings = load_settings([folder / SETTINGS], {"resources.storage": str(storage_of(folder))})
    return SweepSpec(settings, frozenset(json.loads((folder / GIVEN).read_text(encoding="utf-8"))))


def resume_spec(folder: Path, files: Sequence[str], overrides: Mapping[str, Any]) -> SweepSpec:
    """What a sweep was begun with, with what is said anew of ``resources``.

    Args:
        files: of settings that were named beside ``--resume``.
        overrides: settings on the command line beside it, by their dotted names.

    Raises:
        UserError: as ``load_spec``; they ask something else, and not the same once more.
    """
    own = load_spec(folder)
    where = {"resources.storage": own.settings.resources.storage}
    again = load_settings([folder / SETTINGS, *files], {**overrides, **where})
    then, now = own.settings.flat(), again.flat()
    swept = [name for name in own.settings.tune.space if not is_fixed(name, own.fixed)]
    others = {
        name: "is swept" for name in overrides if any(is_fixed(parameter, frozenset({name})) for parameter in swept)
    }
    for name in {**then, **now}:
        if then.get(name) != now.get(name) and not name.startswith("resources."):
            was, is_now = (format_value(flat[name]) if name in flat else "unset" for flat in (then, now))
            others[name] = f"was {was}, is {is_now}"
    if others:
        told = ", ".join(f"{name} ({why})" for name, why in sorted(others.items()))
        raise UserError(f"--resume takes the sweep's own settings; leave out {told}, or begin another sweep")
    return SweepSpec(again, own.fixed)


def check_fingerprint(folder: Path, fingerprint: str) -> None:
    """Raise UserError where the data are no longer those that the sweep was begun with."""
    then = json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))
    if then != fingerprint:
        raise UserError(
            f"--resume: {folder.name} was begun with other data ({then[:12]}, now {fingerprint[:12]}); begin another"
        )


def latest_sweep(folder: Path) -> Path:
    """The sweep that was begun last.

    Raises:
        UserError: there is none.
    """
    begun = {file.parent: file.stat().st_mtime for file in folder.glob(f"*/{SETTINGS}")}
    if not begun:
        raise UserError(f"--resume: {folder} holds no sweep")
    return max(begun, key=begun.__getitem__)


def find_sweep(settings: Settings, name: str) -> Path:
    """The folder of the sweep of this name, or of the one on this machine that was begun last.

    Args:
        name: of the sweep, or "last".

    Raises:
        UserError: there is no sweep, for "last".
    """
    folder = sweep_folder(settings.resources.storage, name)
    return latest_sweep(folder.parent) if name == "last" else folder


def find_trial_folder(sweep: str | Path, ray_id: str, point: Mapping[str, Any]) -> Path:
    """Where a trial's training lies, or would.

    Args:
        ray_id: as Ray Tune knows the trial.
        point: the trial's, where Ray's id is new. The folder is named by that, so that a lost note of
            Ray's is no loss.
    """
    trials = Path(sweep) / TRIALS
    known = trials / f"{ray_id}.txt"
    return trials / (known.read_text(encoding="utf-8") if known.exists() else _name(point))


def make_trial_folder(sweep: str | Path, ray_id: str, point: Mapping[str, Any]) -> Path:
    """``find_trial_folder``, and made if need be."""
    folder = find_trial_folder(sweep, ray_id, point)
    known = folder.with_name(f"{ray_id}.txt")
    folder.mkdir(parents=True, exist_ok=True)
    if not known.exists():
        write_atomic(known, folder.name)
    if not (folder / POINT).exists():
        write_atomic(folder / POINT, json.dumps(point))
    return folder


def read_point(folder: str | Path) -> dict[str, Any]:
    """A trial's point."""
    return json.loads((Path(folder) / POINT).read_text(encoding="utf-8"))


def trial_id_of(folder: str | Path) -> str:
    """A trial's name among all sweeps, which its run in MLflow is tagged with."""
    folder = Path(folder)
    return f"{folder.parent.parent.name}-{folder.name}"


def _name(point: Mapping[str, Any]) -> str:
    return sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:10]


STOPPED, FAILED, OUT_OF_TIME = "stopped by the scheduler", "failed", "out of time"
"""How a trial ends that did not end by itself; see ``progress_log`` for the others."""
UNFINISHED = "not finished"


class TrialStatus(NamedTuple):
    """``state``: FINISHED, EARLY, STOPPED, BUDGET or FAILED. ``reason``: why, in one line."""

    state: str
    reason: str


def save_status(folder: str | Path, state: str, reason: str = "") -> None:
    """Keep how a trial ended. What was kept before stays."""
    file = Path(folder) / END
    if file.parent.is_dir() and not file.exists():
        write_atomic(file, json.dumps({"state": state, "reason": reason}))


def load_status(folder: str | Path) -> TrialStatus | None:
    """How a trial ended, or nothing: it did not yet."""
    file = Path(folder) / END
    return TrialStatus(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def allow_retry(folder: str | Path) -> None:
    """Let a trial that failed, or that time ran out for, go on."""
    end = load_status(folder)
    if end and end.state in (FAILED, OUT_OF_TIME):
        (Path(folder) / END).unlink()


def final_state(report: Mapping[str, Any]) -> str:
    """The end of a trial that nothing went wrong with, from its last report: FINISHED, EARLY or STOPPED."""
    if report["step"] >= report["steps"]:
        return FINISHED
    return STOPPED_EARLY if report["out_of_patience"] else STOPPED
