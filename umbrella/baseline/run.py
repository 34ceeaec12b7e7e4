"""The baseline from settings to predictions: one network for each target, trained and tracked as a run of its own."""

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray

from umbrella.assessment.assessment import AS_ASKED, Assessment
from umbrella.assessment.run import Evaluated, write
from umbrella.assessment.tracked import log
from umbrella.base import ProgressBar, UserError, note
from umbrella.baseline.job import BASELINE, BaselineJob, Question
from umbrella.baseline.targets import Bins, Classes, asked, fit, samples_of, targets_of
from umbrella.config import Settings
from umbrella.conversations.schema import Conversation
from umbrella.data.ingest import Splits, fingerprint, load_splits
from umbrella.data.splits import target_classes
from umbrella.evaluation.predictions import Prediction, read_predictions
from umbrella.evaluation.scoring import check_labels
from umbrella.evaluation.subgroups import tabulate
from umbrella.paths import PREDICTIONS, evaluation_folder, training_folder
from umbrella.storage import check_writable
from umbrella.tracking.provenance import describe
from umbrella.tracking.store import open_experiment, tracking_uri
from umbrella.training.checkpoint_files import best_checkpoint
from umbrella.training.checkpoint_sync import synced
from umbrella.training.cluster import start_ray
from umbrella.training.resource_check import max_concurrent_trainings
from umbrella.training.run import check_target_names, run_tracked_job
from umbrella.training.run_lock import run_lock

NOTE = "this network sees one volume of each conversation and no words; its numbers are computed, not generated"


def run_baseline(settings: Settings, progress: ProgressBar) -> Iterator[Evaluated]:
    """Train a network for each target and evaluate it on ``evaluate.split``; gives each evaluation when it is done.

    Raises:
        UserError: whatever is wrong with settings or data, before anything starts; or what ended a training.
        Stopped: SIGTERM came; the training saved and stopped.
    """
    splits, jobs = make_jobs(settings, progress)
    for job in jobs:
        folder = Path(job.folder)
        with run_lock(folder), synced(settings.resources, folder, progress):
            run_tracked_job(job)
            evaluated = evaluate(job, splits)
        yield evaluated


def make_jobs(settings: Settings, progress: ProgressBar) -> tuple[Splits, list[BaselineJob]]:
    """The data, and all that is to be trained, checked and ready to run on the Ray that this starts.

    Raises:
        UserError: as ``run_baseline``.
    """
    storage = Path(settings.resources.storage).absolute()
    check_writable(storage, f"resources.storage={settings.resources.storage}")
    check_settings(settings)  # before a Ray is started
    name = settings.named("baseline").name
    start_ray(settings.resources, log_to_driver=True, name=name)
    splits, heads = load_checked(settings, progress)
    uri = tracking_uri(storage, settings.tracking.uri)
    experiment = open_experiment(uri, settings.experiment, storage)
    max_concurrent_trainings(settings.resources, ray.cluster_resources(), ray.nodes())
    jobs = []
    for target, head in heads.items():
        own = "-".join([name, re.sub(r"[^\w.-]", "_", target)])
        tracking: dict[str, str | None] = {"uri": uri, "experiment": experiment, "name": own, "trial": own}
        jobs.append(make_job(settings, splits, target, head, tracking, str(training_folder(storage, own))))
    return splits, jobs


def load_checked(
    settings: Settings, progress: ProgressBar, dry_run: bool = False
) -> tuple[Splits, dict[str, Classes | Bins]]:
    """The data, and what the network of each target says, after every check that is made before the start.

    Args:
        dry_run: as in ``load_splits``.

    Raises:
        UserError: as ``run_baseline``.
    """
    check_settings(settings)
    # With the split that is asked.
    splits = load_splits(settings.with_values({"evaluate.at_end": True}), progress, dry_run=dry_run)
    return splits, {target: check(settings, splits, target) for target in pick_targets(settings, splits)}


def check_settings(settings: Settings) -> None:
    """Raise UserError for what is wrong before any data are read."""
    modality = settings.baseline.modality
    if modality not in settings.modalities:
        raise UserError(f"baseline.modality={modality}: there are {', '.join(settings.modalities)}")
    if settings.data.train and settings.evaluate.split == "test" and not settings.data.test:
        raise UserError("data.test is not set: name the conversations to evaluate on, or set evaluate.split")


def pick_targets(settings: Settings, splits: Splits) -> list[str]:
    """``baseline.target``, or all that can be learned; what is left out is named on standard error.

    Raises:
        UserError: there is none.
    """
    modality, known = settings.baseline.modality, targets_of(splits.train)
    if settings.baseline.target:
        if settings.baseline.target not in known:
            raise UserError(
                f"baseline.target={settings.baseline.target}: data.train has labels of {', '.join(known) or 'nothing'}"
            )
        return [settings.baseline.target]
    picked = []
    for target in known:
        missing = [name for name in _needed(settings) if not asked(getattr(splits, name), target, modality)]
        if missing:
            note(f"target {target!r} is left out: {_nothing(missing[0], target, modality)}")
        else:
            picked.append(target)
    if not picked:
        raise UserError(f"data.train: no label that a volume of baseline.modality={modality} could be asked for")
    return picked


def check(settings: Settings, splits: Splits, target: str) -> Classes | Bins:
    """What the network for a target says, once the data of all splits were found to fit.

    Raises:
        UserError: a split without samples; labels that do not fit together; a name that MLflow does not take.
    """
    check_target_names([target])
    own = settings.baseline
    for name in _needed(settings):
        if not asked(getattr(splits, name), target, own.modality):
            raise UserError(f"baseline.target={target}: {_nothing(name, target, own.modality)}")
    head = fit(target, [sample.label for sample in samples_of(splits.train, target, own.modality)], own.bins)
    if isinstance(head, Classes):
        check_labels({target: {label: label for label in head.names}})
    for name in _needed(settings):
        for conversation, _ in asked(getattr(splits, name), target, own.modality):
            if not head.knows(conversation.label):
                raise UserError(
                    f"data.{name}: {conversation.task_id}: its label {conversation.label!r} of {target!r} is none that"
                    f" data.train has ({head.in_words})"
                )
    return head


def resolved(settings: Settings, target: str, head: Classes | Bins, labels: set[str]) -> Settings:
    """The settings under the names that a training goes by: those of ``optim``, ``train`` and ``tune`` are true too.

    Args:
        labels: the classes of the validation split. With one of them there is no balanced accuracy, and the loss
            decides.
    """
    own = settings.baseline
    metric = f"eval/{target}/mae" if isinstance(head, Bins) else f"eval/{target}/balanced_accuracy"
    if isinstance(head, Classes) and len(labels) == 1:
        metric = "eval/loss"
    return settings.with_values(
        {
            "baseline.target": target,
            "optim.lr": own.lr,
            "optim.embedder_lr": None,
            "optim.weight_decay": own.weight_decay,
            "train.epochs": own.epochs,
            "train.batch_size": own.batch_size,
            "train.accumulate": 1,
            "tune.metric": metric,
            "tune.mode": "max" if metric.endswith("balanced_accuracy") else "min",
        }
    )


def make_job(
    settings: Settings,
    splits: Splits,
    target: str,
    head: Classes | Bins,
    tracking: dict[str, str | None],
    folder: str,
) -> BaselineJob:
    """The job of one target, its samples put into Ray's object store."""
    modality = settings.baseline.modality
    used = {name: [c for c, _ in asked(getattr(splits, name), target, modality)] for name in ("train", "validation")}
    return BaselineJob(
        task=BASELINE,
        settings=resolved(settings, target, head, target_classes(used["validation"])[target]),
        data={"data.fingerprint": splits.fingerprint, "data.quarantined": splits.quarantined},
        tracking=tracking,
        folder=folder,
        start_time=time.time(),
        datasets=[
            describe("training", used["train"], splits.fingerprint, settings.data.train),
            describe("validation", used["validation"], splits.fingerprint, settings.data.validation),
        ],
        target=target,
        head=head,
        samples=ray.put(samples_of(splits.train, target, modality)),
        validation=ray.put(questions(splits.validation, target, modality)),
        asked=ray.put(questions(getattr(splits, settings.evaluate.split), target, modality)),
    )


def questions(conversations: Sequence[Conversation], target: str, modality: str) -> list[Question]:
    """What a network for this target can be asked."""
    return [(Prediction.of(conversation), path) for conversation, path in asked(conversations, target, modality)]


def _needed(settings: Settings) -> list[str]:
    return list(dict.fromkeys(["train", "validation", settings.evaluate.split]))


def _nothing(split: str, target: str, modality: str) -> str:
    return f"data.{split} has no label of it that belongs to a volume of baseline.modality={modality}"


def evaluate(job: BaselineJob, splits: Splits) -> Evaluated:
    """Count, write and track what the network of a training that has ended answered.

    Raises:
        UserError: it has no checkpoint that was evaluated; a folder that cannot be written to.
    """
    tune, split, own = job.settings.tune, job.settings.evaluate.split, job.settings.baseline
    best = best_checkpoint(job.folder, tune.metric, tune.mode)
    if best is None:
        raise UserError(f"{job.folder}: no checkpoint with a {tune.metric}; train anew under another name")
    folder = evaluation_folder(job.settings.resources.storage, str(job.tracking["name"]))
    if job.settings.output:  # a folder in it for each target
        folder = Path(job.settings.output).absolute() / job.target.replace("/", "_")
    check_writable(folder, f"output={folder}")
    # What a person may have asked of a language model, and this one has not.
    settings = job.settings.with_values({"evaluate.controls": [], "evaluate.generate": False, "evaluate.pictures": 0})
    predictions = read_predictions(Path(job.folder) / PREDICTIONS)
    labels = [c.label for c in splits.train if c.target == job.target and c.label is not None]
    groups = tabulate(predictions, settings.evaluate, settings.seed, {job.target: labels})
    conversations = getattr(splits, split)
    facts: dict[str, str | int | float] = {
        "network": f"SFCN, a 3D CNN, for {job.target}",
        "data fingerprint": fingerprint({split: conversations}),
        "quarantined samples": splits.quarantined,
        "seconds": round(time.time() - job.start_time),
    }
    of_target = [c for c in conversations if c.target == job.target]
    answered = [c for c, _ in asked(conversations, job.target, own.modality)]
    notes = [NOTE]
    if len(answered) < len(of_target):
        notes.append(
            f"{len(answered)} of {len(of_target)} conversations about {job.target} have a {own.modality} to see"
        )
    assessment = Assessment(settings, str(best), split, {AS_ASKED: predictions}, {AS_ASKED: groups}, facts, notes)
    page = write(folder, assessment, ())
    log(assessment, folder, answered)
    return Evaluated(assessment, folder, page)
