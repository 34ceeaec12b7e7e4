"""One trial of a sweep: what Ray Tune's trial process runs. It imports little, see ``training.job``."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ray import tune

from umbrella.base import UserError
from umbrella.training.history import cut, read_history
from umbrella.training.job import Job, run_job
from umbrella.training.progress import latest_checkpoint, what_is_wrong
from umbrella.tuning.ending import FAILED, read_end, write_end
from umbrella.tuning.space import label

POLL = 0.2
"""Seconds between looks at what the training has noted."""
POINT, MARKER, ADOPTED = "point.json", "checkpoint_of.json", "adopted.json"


def run_trial(config: dict[str, Any], job: Job) -> None:
    """One trial: a training with the point's values, whose evaluations Ray Tune is told.

    The training's folder knows how far it is, and how it ended; Ray Tune's own notes may be older, after a kill. So all
    evaluations are told again to whoever asks anew, and what has ended is not run again.
    """
    folder = trial_folder(job.folder, tune.get_context().get_trial_id(), config)
    job = replace(
        job,
        settings=job.settings.with_values(config),
        swept=config,
        tracking={**job.tracking, "name": label(config), "trial": name_of(folder)},
        folder=str(folder),
        begun=time.time(),
    )
    adopt(folder)
    end = read_end(folder)
    if end and end.state == FAILED:  # Ray Tune tries again; where the settings are to blame, that changes nothing
        raise UserError(end.reason)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(run_job, job) if not end else None
        told: set[int] = set()
        while True:
            over = not training or bool(wait([training], timeout=POLL).done)
            for row in read_history(folder):
                if row["step"] not in told:
                    told.add(row["step"])
                    _report(row, folder, job)
            if over:
                break
    if training:
        try:
            training.result()
        except UserError as error:
            write_end(folder, FAILED, str(error))
            raise


def trial_folder(sweep: str | Path, ray_id: str, point: Mapping[str, Any]) -> Path:
    """Where a trial's training lies: named by the point that it began with, so that a lost note of Ray's is no loss."""
    trials = Path(sweep) / "trials"
    known = trials / f"{ray_id}.txt"
    text = json.dumps(point, sort_keys=True)
    trials.mkdir(parents=True, exist_ok=True)
    if not known.exists():  # population-based training changes the values later
        _put(known, sha256(text.encode()).hexdigest()[:10])
    folder = trials / known.read_text(encoding="utf-8")
    folder.mkdir(exist_ok=True)
    _put(folder / POINT, json.dumps(point))
    return folder


def _put(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def name_of(folder: str | Path) -> str:
    """A trial's name among all sweeps, which its run in MLflow is tagged with."""
    folder = Path(folder)
    return f"{folder.parent.parent.name}-{folder.name}"


def adopt(folder: Path) -> None:
    """Begin from another trial's checkpoint, if population-based training says so and it was not done yet."""
    marked = tune.get_checkpoint()
    if marked is None:
        return
    with marked.as_directory() as inside:
        text = (Path(inside) / MARKER).read_text(encoding="utf-8")
    donor = Path(json.loads(text)["checkpoint"])
    done = folder / ADOPTED
    if donor.parent == folder or (done.exists() and done.read_text(encoding="utf-8") == text):
        return
    source = donor if not what_is_wrong(donor) else latest_checkpoint(donor.parent)  # it was pruned since
    if source is None:
        return
    partial = folder / f".{source.name}.adopted"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    for own in folder.glob("step_*"):
        shutil.rmtree(own)
    partial.rename(folder / source.name)
    cut(folder, int(source.name.removeprefix("step_")))
    done.write_text(text, encoding="utf-8")


def _report(row: dict[str, Any], folder: Path, job: Job) -> None:
    if job.settings.tune.scheduler != "pbt":
        tune.report(row)
        return
    with tempfile.TemporaryDirectory() as marked:  # the checkpoint itself stays where it is
        checkpoint = str(folder / f"step_{row['step']:07d}")
        (Path(marked) / MARKER).write_text(json.dumps({"checkpoint": checkpoint}), encoding="utf-8")
        tune.report(row, checkpoint=tune.Checkpoint.from_directory(marked))
