"""The job of one training, and the TorchTrainer that runs it.

Three processes of each training unpickle this file: the trial, Ray Train's controller and the worker. Only the worker
needs the model, so only the worker imports it: seconds per trial.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.data import ExecutionOptions
from ray.train import CheckpointConfig, DataConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from umbrella.config import Settings
from umbrella.data.pipeline import Plan, evaluation_datasets, train_datasets


@dataclass(frozen=True)
class Job:
    """What every worker of one training is told."""

    settings: Settings
    train: ray.ObjectRef
    """Table of the training conversations, see ``data.pipeline.to_table``."""
    validation: ray.ObjectRef
    train_lengths: np.ndarray
    """See ``data.intake.Splits.lengths``."""
    validation_lengths: np.ndarray
    candidates: Mapping[str, Mapping[str, str]]
    """See ``evaluation.scoring.Candidates``."""
    data: Mapping[str, str | int]
    """What is tracked of the data: their fingerprint, and how many samples are in quarantine."""
    tracking: dict[str, str | None]
    """Arguments of ``Tracker.start``."""
    folder: str
    """Where Ray Train keeps this training's checkpoints."""

    @property
    def plan(self) -> Plan:
        """Which sample each worker sees at each step."""
        train = self.settings.train
        return Plan(
            size=len(self.train_lengths),
            seed=self.settings.seed,
            epochs=train.epochs,
            workers=self.settings.resources.workers,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            lengths=self.train_lengths,
            window=self.settings.data.bucket_batches,
        )


def train_loop(config: dict[str, Job]) -> None:
    """Train from the last checkpoint, or from the start, to the end of the plan: what each worker process runs."""
    from umbrella.training.worker import Worker

    Worker(config["job"]).run()


def make_trainer(job: Job, callbacks: Sequence[Any] = ()) -> TorchTrainer:
    """The trainer of a job. A trainer of a job whose folder holds checkpoints continues from the last one."""
    resources, tune = job.settings.resources, job.settings.tune
    folder = Path(job.folder)

    def position() -> int:
        steps = sorted(folder.glob("step_*/progress.json"))
        return json.loads(steps[-1].read_text(encoding="utf-8"))["position"] if steps else 0

    per_worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    return TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        datasets=train_datasets(job.plan, position) | evaluation_datasets(job.validation_lengths, job.plan.workers),
        dataset_config=DataConfig(datasets_to_split=[], execution_options=ExecutionOptions(preserve_order=True)),
        scaling_config=ScalingConfig(
            num_workers=job.plan.workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            storage_path=str(folder.parent),
            name=folder.name,
            callbacks=list(callbacks),
            logging_config=LoggingConfig(log_level="WARNING"),
            # The newest one, to resume from, is kept beside the best.
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute=tune.metric, checkpoint_score_order=tune.mode
            ),
        ),
    )


def progress_line(report: dict[str, Any]) -> str:
    """One line on how far a training is."""
    wanted = ("train/loss", "train/lr", "train/samples_per_second", "train/waiting_for_data")
    shown = [name for name in report if name in wanted or name.startswith("eval/")]
    values = "  ".join(f"{name.removeprefix('train/')} {report[name]:.4g}" for name in shown)
    return f"step {report['step']}/{report['steps']}  epoch {report['epoch']:.2f}  {values}"
