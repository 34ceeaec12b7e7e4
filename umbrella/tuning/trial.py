"""One trial of a sweep: what Ray Tune's trial process runs. It imports little, see ``training.job``."""

import gc
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from umbrella.base import Stopped, UserError
from umbrella.training.history import cut, read_history
from umbrella.training.job import Job, run_job
from umbrella.training.progress import latest_checkpoint, read_progress
from umbrella.training.requests import stop_file
from umbrella.training.settings import ResourceSettings
from umbrella.tuning.ending import FAILED, STOPPED, how_it_ended, read_end, write_end
from umbrella.tuning.folder import name_of, trial_folder
from umbrella.tuning.space import label

POLL = 0.1
"""Seconds between looks at what the training has noted."""


class TrialRunner(tune.Trainable):
    """A training with a point's values, whose evaluations Ray Tune is told, one a step.

    With one worker the training runs in this process, which takes one trial after the other: the time to start
    processes and to import is spent once. With several, Ray Train starts their processes for each trial.

    The training's folder knows how far it is, and how it ended; Ray Tune's own notes may be older, after a kill. So all
    evaluations are told again to whoever asks anew, and what has ended is not run again.
    """

    def __repr__(self) -> str:  # as Ray's dashboard calls its process; Ray asks once, when it starts
        return "trials of " + Path(self.sweep.folder).name

    def setup(self, config: dict[str, Any], job: Job) -> None:
        """Prepare a trial; nothing starts before the first step, which may come after ``load_checkpoint``."""
        self.sweep, self.told = job, set[int]()
        self.training: Future[None] | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial, in the process of the one before."""
        self._leave()
        _make_room()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """The next evaluation, when it is there.

        Raises:
            UserError: what the training stopped for.
        """
        end = read_end(self.folder)
        if end and end.state == FAILED:  # Ray Tune tries again; where the settings are to blame, that changes nothing
            raise UserError(end.reason)
        over = False
        while True:
            rows = read_history(self.folder)
            untold = [row for row in rows if row["step"] not in self.told]
            if untold:
                break
            if over:
                self._finish()
                raise RuntimeError("the training ended without an evaluation")
            if self.training is None and not end:  # not before all is told: what was told may decide
                self.training = self._start()
            if self.training:
                wait([self.training], timeout=POLL)
            over = self.training is None or self.training.done()
        row = untold[0]
        self.told.add(row["step"])
        last = how_it_ended(row) != STOPPED or (end is not None and len(untold) == 1)
        if last:
            self._finish()
        return {**row, "done": last}

    def cleanup(self) -> None:
        """The trial is over, or was stopped."""
        self._leave()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Ray Tune asks for it where a trial pauses. The training's folder holds all of it."""
        # Not empty: Ray looks for the folder, and a mirror in an object store keeps files only.
        (Path(checkpoint_dir) / "trial.txt").write_text(self.folder.name, encoding="utf-8")

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """The training goes on from its folder, where another trial's checkpoint lies if it is to take that."""

    def _begin(self, config: dict[str, Any]) -> None:
        self.told, self.training = set(), None
        self.folder = trial_folder(self.sweep.folder, self.trial_id, config)
        if not read_end(self.folder):  # what was evaluated without a checkpoint is done again, and told then
            latest = latest_checkpoint(self.folder)
            cut(self.folder, read_progress(latest).step if latest else 0)
        self.job = replace(
            self.sweep,
            settings=self.sweep.settings.with_values(config),
            swept=config,
            tracking={**self.sweep.tracking, "name": label(config), "trial": name_of(self.folder)},
            folder=str(self.folder),
        )

    def _start(self) -> "Future[None]":
        job = replace(self.job, begun=time.time())
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="training")
        return self.pool.submit(run_job, job, job.settings.resources.alone)

    def _finish(self) -> None:
        """Wait for the end of the training; raises what it stopped for."""
        if self.training:
            try:
                with suppress(Stopped):
                    self.training.result()
            except UserError as error:
                write_end(self.folder, FAILED, str(error))
                raise

    def _leave(self) -> None:
        """Let a training that still runs stop after its step, with a checkpoint."""
        if self.training is None:
            return
        if not self.training.done():
            stop_file(self.folder).touch()
        with suppress(Exception):  # told already, or nobody's concern any more
            self.training.result()
        self.pool.shutdown()
        self.training = None


def _make_room() -> None:
    """For another training in this process: what is left of the one before refers to itself, a model on the GPU too."""
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def trial_resources(resources: ResourceSettings) -> dict[str, float]:
    """What Ray Tune reserves for a trial's own process."""
    if resources.alone:
        gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
        return {"CPU": resources.cpus_per_worker, **gpus}
    # It waits for its workers; if it held a CPU itself, two cores would soon hold nothing but waiting trials.
    return {"node:__internal_head__": 0.001}
