"""Train and evaluate the baseline: one network and one MLflow run per target."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import ray

from umbrella.base import ProgressBar, UserError, note
from umbrella.baseline.targets import (
    BASELINE_TASK,
    BaselineJob,
    LabelEncoding,
    fit_encoding,
    make_samples,
    pair_with_volumes,
)
from umbrella.cluster import join_cluster, max_concurrent_trainings, start_ray
from umbrella.config import Settings
from umbrella.conversations.schema import Conversation, questions_of
from umbrella.data.ingest import load_splits
from umbrella.data.splits import Splits, fingerprint, target_classes
from umbrella.evaluation.calibration import calibrate, read_temperatures
from umbrella.evaluation.candidates import check_labels
from umbrella.evaluation.group_metrics import tabulate
from umbrella.evaluation.predictions import Prediction, read_predictions
from umbrella.evaluation.report import AS_ASKED, EvaluationResult, write_evaluation
from umbrella.evaluation_run.evaluate import log_to_mlflow, with_confounds
from umbrella.fileio import check_writable, run_lock
from umbrella.paths import EVALUATIONS, PREDICTIONS, TRAININGS
from umbrella.tracking.provenance import describe_dataset
from umbrella.tracking.store import open_experiment, tracking_uri
from umbrella.training.checkpoint_files import best_checkpoint
from umbrella.training.checkpoint_sync import synced
from umbrella.training.run import check_target_names, run_tracked_job

NOTE = "this network sees one volume of each conversation and no words; its numbers are computed, not generated"


def run_baseline(settings: Settings, progress: ProgressBar) -> Iterator[tuple[EvaluationResult, Path]]:
    """Train one network per target and evaluate it on ``evaluate.split``. Yields each evaluation when it is complete.

    Raises:
        UserError: if settings or data are invalid (before any training starts), or if a training fails.
        Stopped: if SIGTERM stopped the training, after a checkpoint was saved.
    """
    splits, jobs = make_jobs(settings, progress)
    for job in jobs:
        folder = Path(job.folder)
        with run_lock(folder), synced(settings.resources, folder, progress):
            run_tracked_job(job)
            evaluated = evaluate(job, splits)
        yield evaluated


def make_jobs(settings: Settings, progress: ProgressBar) -> tuple[Splits, list[BaselineJob]]:
    """Check settings and data, start Ray, and return the splits and one job per target.

    Raises:
        UserError: if settings or data are invalid.
    """
    storage = Path(settings.resources.storage).absolute()
    check_writable(storage, f"resources.storage={settings.resources.storage}")
    _check_settings(settings)
    name = settings.with_name("baseline").name
    join_cluster(settings.resources, name, log_to_driver=True)
    splits, encodings = load_and_check(settings, progress)
    start_ray(settings.resources, log_to_driver=True, name=name)
    uri = tracking_uri(storage, settings.tracking.uri)
    experiment = open_experiment(uri, settings.experiment, storage)
    max_concurrent_trainings(settings.resources)
    data_fingerprint = splits.fingerprint
    jobs = []
    for target, encoding in encodings.items():
        run_name = "-".join([name, re.sub(r"[^\w.-]", "_", target)])
        pairs = _find_pairs(settings, splits, target)
        used = {split: [conversation for conversation, _ in of_split] for split, of_split in pairs.items()}
        references = {
            split: ray.put([(Prediction.from_conversation(conversation), path) for conversation, path in of_split])
            for split, of_split in pairs.items()
        }
        job = BaselineJob(
            task=BASELINE_TASK,
            settings=training_settings(settings, target, encoding, target_classes(used["validation"])[target]),
            data={"data.fingerprint": data_fingerprint, "data.quarantined": splits.quarantined},
            tracking={"uri": uri, "experiment": experiment, "name": run_name, "trial": run_name},
            folder=str(storage / TRAININGS / run_name),
            start_time=time.time(),
            datasets=[
                describe_dataset("training", used["train"], data_fingerprint, settings.data.train),
                describe_dataset("validation", used["validation"], data_fingerprint, settings.data.validation),
            ],
            target=target,
            encoding=encoding,
            samples=ray.put(make_samples(pairs["train"])),
            validation=references["validation"],
            evaluation=references[settings.evaluate.split],
        )
        jobs.append(job)
    return splits, jobs


def load_and_check(
    settings: Settings, progress: ProgressBar, dry_run: bool = False
) -> tuple[Splits, dict[str, LabelEncoding]]:
    """Load the splits and choose the label encoding of each target, with all checks that precede a training.

    Targets are ``baseline.target``, or else every target with samples in all required splits; a note on standard error
    names each one that is left out.

    Args:
        dry_run: see ``load_splits``.

    Raises:
        UserError: if settings or data are invalid.
    """
    _check_settings(settings)
    chosen, modality = settings.baseline.target, settings.baseline.modality
    # evaluate.at_end makes load_splits load evaluate.split, too.
    splits = load_splits(settings.with_values({"evaluate.at_end": True}), progress, dry_run=dry_run)
    known = sorted({c.target for c in questions_of(splits.train) if c.label is not None})
    if chosen and chosen not in known:
        raise UserError(f"baseline.target={chosen}: data.train has labels of {', '.join(known) or 'nothing'}")
    encodings = {}
    for target in [chosen] if chosen else known:
        pairs = _find_pairs(settings, splits, target)
        empty = [split for split, of_split in pairs.items() if not of_split]
        if empty:
            missing = f"data.{empty[0]} has no label of it that belongs to a volume of baseline.modality={modality}"
            if chosen:
                raise UserError(f"baseline.target={target}: {missing}")
            note(f"target {target!r} is left out: {missing}")
            continue
        check_target_names([target])
        encoding = fit_encoding(
            target, [sample.label for sample, _ in make_samples(pairs["train"])], settings.baseline.bins
        )
        check_labels({target: {label: label for label in encoding.classes}})
        for split, conversation in ((split, c) for split, of_split in pairs.items() for c, _ in of_split):
            if not encoding.is_valid(conversation.label):
                raise UserError(
                    f"data.{split}: {conversation.task_id}: its label {conversation.label!r} of {target!r} does not"
                    f" occur in data.train ({encoding.description}); correct it, or leave the conversation out"
                )
        encodings[target] = encoding
    if not encodings:
        raise UserError(f"data.train: no labelled conversation has a volume of baseline.modality={modality}")
    return splits, encodings


def _check_settings(settings: Settings) -> None:
    """Check the settings that need no data."""
    modality = settings.baseline.modality
    if modality not in settings.modalities:
        raise UserError(f"baseline.modality={modality}: there are {', '.join(settings.modalities)}")
    if settings.data.train and settings.evaluate.split == "test" and not settings.data.test:
        raise UserError("data.test is not set: name the conversations to evaluate on, or set evaluate.split")


def _find_pairs(settings: Settings, splits: Splits, target: str) -> dict[str, list[tuple[Conversation, str]]]:
    """Each required split to its labelled conversations about the target with their volumes."""
    names = dict.fromkeys(["train", "validation", settings.evaluate.split])
    return {name: pair_with_volumes(getattr(splits, name), target, settings.baseline.modality) for name in names}


def training_settings(settings: Settings, target: str, encoding: LabelEncoding, labels: set[str]) -> Settings:
    """Return settings with the values of ``baseline`` copied to ``optim``, ``train`` and ``tune``.

    Args:
        labels: the classes in the validation split. With a single class, balanced accuracy is undefined, and the
            loss selects the best checkpoint.
    """
    baseline = settings.baseline
    metric = f"eval/{target}/{'balanced_accuracy' if encoding.classes else 'mae'}"
    if encoding.classes and len(labels) == 1:
        metric = "eval/loss"
    return settings.with_values(
        {
            "baseline.target": target,
            "optim.lr": baseline.lr,
            "optim.embedder_lr": None,
            "optim.weight_decay": baseline.weight_decay,
            "train.epochs": baseline.epochs,
            "train.batch_size": baseline.batch_size,
            "train.accumulate": 1,
            "tune.metric": metric,
            "tune.mode": "max" if metric.endswith("balanced_accuracy") else "min",
        }
    )


def evaluate(job: BaselineJob, splits: Splits) -> tuple[EvaluationResult, Path]:
    """Compute the metrics of a completed training from its predictions, write the report and log to MLflow.

    Raises:
        UserError: if no checkpoint has an evaluation, or the folder is not writable.
    """
    tune, split, modality = job.settings.tune, job.settings.evaluate.split, job.settings.baseline.modality
    best = best_checkpoint(job.folder, tune.metric, tune.mode)
    if best is None:
        raise UserError(f"{job.folder}: no checkpoint with a {tune.metric}; train anew under another name")
    folder = Path(job.settings.resources.storage) / EVALUATIONS / str(job.tracking["name"])
    if job.settings.output:
        folder = Path(job.settings.output).absolute() / job.target.replace("/", "_")
    check_writable(folder, f"output={folder}")
    # These settings apply to language models only.
    settings = job.settings.with_values({"evaluate.controls": [], "evaluate.generate": False, "evaluate.pictures": 0})
    predictions = read_predictions(Path(job.folder) / PREDICTIONS)
    training = [c for c in questions_of(splits.train) if c.target == job.target]
    labels = [c.label for c in training if c.label is not None]
    groups = tabulate(predictions, settings.evaluate, settings.seed, {job.target: labels})
    conversations = getattr(splits, split)
    facts: dict[str, str | int | float] = {
        "network": f"SFCN, a 3D CNN, for {job.target}",
        "data fingerprint": fingerprint({split: conversations}),
        "quarantined samples": splits.quarantined,
        "seconds": round(time.time() - job.start_time),
    }
    total = sum(c.target == job.target for c in questions_of(conversations))
    evaluated = [c for c, _ in pair_with_volumes(conversations, job.target, modality)]
    notes = [NOTE]
    if len(evaluated) < total:
        notes.append(f"{len(evaluated)} of {total} conversations about {job.target} have a volume of {modality}")
    calibration = calibrate(predictions, read_temperatures(best), settings.evaluate, settings.seed)
    answers, tables = {AS_ASKED: predictions}, {AS_ASKED: groups}
    result = EvaluationResult(settings, str(best), split, answers, tables, facts, notes, calibration=calibration)
    result = with_confounds(result, training, evaluated)
    page = write_evaluation(folder, result, ())
    log_to_mlflow(result, folder, evaluated)
    return result, page
