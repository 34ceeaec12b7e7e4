"""Run one training, from its settings to its checkpoints."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import ray

from umbrella.base import ProgressBar, Stopped, UserError, on_sigterm
from umbrella.cluster import join_cluster, max_concurrent_trainings, start_ray
from umbrella.config import Settings
from umbrella.conversations.schema import questions_of
from umbrella.data.ingest import load_splits
from umbrella.data.masking import audit
from umbrella.data.pipeline import group_samples, to_table
from umbrella.data.rendering import load_renderer
from umbrella.data.splits import Splits, target_classes
from umbrella.evaluation.candidates import check_candidates, check_labels, find_candidates, find_numbers
from umbrella.evaluation.metrics import metric_names
from umbrella.fileio import check_writable, run_lock, write_atomic
from umbrella.paths import BEGUN, SETTINGS, STOP, TRAININGS, WORKERS
from umbrella.tracking.mlflow_logger import close_run, run_key
from umbrella.tracking.provenance import describe_dataset
from umbrella.tracking.store import is_valid_metric, open_experiment, tracking_uri
from umbrella.training.checkpoint_files import best_checkpoint, complete_checkpoints
from umbrella.training.checkpoint_sync import synced
from umbrella.training.launch import LANGUAGE_MODEL, resume_command, run_job, stopped_without_checkpoint
from umbrella.training.run_summary import audit_sample
from umbrella.training.task import Job, LanguageModelJob
from umbrella.version import check_version, write_version


def load_and_check(
    settings: Settings,
    progress: ProgressBar,
    trials: Sequence[Settings] = (),
    dry_run: bool = False,
) -> Splits:
    """Load the data of a training or sweep, and make all checks that precede its start.

    See ``load_splits`` for the arguments, and for errors also ``check_model`` and ``check_data``.
    """
    for trial in {str((trial.modalities, trial.model)): trial for trial in trials or [settings]}.values():
        check_model(trial)  # first: it takes seconds, and decoding volumes may take hours
    splits = load_splits(settings, progress, trials, dry_run)
    check_data(settings, splits, trials)
    return splits


def check_model(settings: Settings) -> None:
    """Raise UserError if ``settings.model`` gives no model and tokenizer, or needs another device."""
    for name, value in {"attention": "varlen", "frozen_dtype": "float8"}.items():
        if getattr(settings.model, name) == value and not settings.resources.gpus_per_worker:
            raise UserError(f"model.{name}={value}: needs a GPU; set resources.gpus_per_worker=1")
    if settings.model.frozen_dtype == "float8" and settings.train.shard and settings.resources.workers > 1:
        raise UserError("model.frozen_dtype=float8: cannot quantise sharded weights; set train.shard=false")
    load_renderer(settings)
    if settings.model.checkpoint:
        from umbrella.models.build import check_checkpoint  # slow to import, and the tiny model does not need it

        check_checkpoint(settings.model, settings.modalities)


def check_data(settings: Settings, splits: Splits, trials: Sequence[Settings] = ()) -> None:
    """Check that the data suit the mask policies, the scoring, and the metric that ranks checkpoints.

    Args:
        trials: as in ``load_splits``; given for a sweep, whose metric must name one of several targets.

    Raises:
        UserError: a policy supervises no token, or has a weight for a task that the data do not have; two labels of a
            target are too similar; a label has no candidate answer; the data do not give the metric.
    """
    sweep, trials, metric = bool(trials), trials or [settings], settings.tune.metric
    renderer = load_renderer(trials[0])
    examples = [renderer.render(splits.train[i]) for i in audit_sample(len(splits.train))]
    task_types = sorted({c.task_type for c in splits.train})
    for policy in {str(trial.mask): trial.mask for trial in trials}.values():
        unknown = sorted(policy.task_weights.keys() - set(task_types))
        if unknown:
            raise UserError(
                f"mask.task_weights: {', '.join(unknown)}: not a task_type of data.train, which has"
                f" {', '.join(task_types)}; name one of those, or leave it out"
            )
        audit(examples, policy)
    candidates = find_candidates(splits.train, settings.evaluate.number_grids)
    check_labels(candidates)
    check_labels(settings.evaluate.candidates)
    check_candidates(splits.validation, candidates)
    check_candidates(splits.test, {**candidates, **settings.evaluate.candidates})
    classes = {target: len(labels) for target, labels in target_classes(splits.validation).items()}
    several = any(sum(isinstance(q.label, str) for q in c.questions()) > 1 for c in splits.validation)
    labelled = find_numbers(splits.validation)
    check_target_names(sorted(labelled.union(classes)))
    known = metric_names(classes, several, {t for t in labelled if t in candidates and t not in classes})
    scored = [target for target, number in sorted(classes.items()) if number > 1]
    if sweep and metric == "eval/balanced_accuracy" and len(scored) > 1:
        known.remove(metric)
        raise UserError(
            f"tune.metric={metric}: is the mean over {', '.join(scored)}; name the one that ranks the trials:"
            f" {', '.join(known)}"
        )
    if metric.endswith(("/mae", "/rmse")) and settings.tune.mode == "max":
        raise UserError(f"tune.metric={metric}: is an error, so smaller is better; add tune.mode=min")
    if metric not in known:
        one = sorted(target for target, number in classes.items() if number == 1)
        why = f"; data.validation has one class only of {', '.join(one)}" if one else ""
        raise UserError(
            f"tune.metric={metric}: these data give {', '.join(known)} (tune.mode=min for losses and errors){why}"
        )


def check_target_names(targets: Iterable[str]) -> None:
    """Raise UserError if a target cannot be part of a metric's name in MLflow."""
    invalid = [target for target in targets if not is_valid_metric(f"eval/{target}/balanced_accuracy")]
    if invalid:
        raise UserError(
            f"target {invalid[0]!r} becomes part of a metric's name: use letters, digits, and _-. :/ only"
            " (a slash only between two of the others), at most 200 in all"
        )


def make_job(settings: Settings, splits: Splits, tracking: dict[str, str | None], folder: str) -> LanguageModelJob:
    """Make the job of a training, and put its tables into Ray's object store."""
    fingerprint = splits.fingerprint
    return LanguageModelJob(
        task=LANGUAGE_MODEL,
        settings=settings,
        train=ray.put(to_table(splits.train)),
        validation=ray.put(to_table(questions_of(splits.validation))),
        train_lengths=splits.lengths["train"],
        train_tokens=splits.tokens,
        train_groups=group_samples(splits.train, settings.data.group_batches_by),
        validation_lengths=splits.lengths["validation"],
        candidates=find_candidates(splits.train, settings.evaluate.number_grids),
        modalities=sorted({volume.modality for c in splits.train for volume in c.volumes}),
        longest_answer=splits.longest_answer,
        data={"data.fingerprint": fingerprint, "data.quarantined": splits.quarantined},
        tracking=tracking,
        folder=folder,
        start_time=time.time(),
        datasets=[
            describe_dataset("training", splits.train, fingerprint, settings.data.train),
            describe_dataset("validation", splits.validation, fingerprint, settings.data.validation),
        ],
    )


def run_training(settings: Settings, progress: ProgressBar, then: Callable[[Path], None] = lambda folder: None) -> Path:
    """Run one training and return its folder.

    Args:
        then: called with the folder after the training. Files that it writes there are uploaded too.

    Raises:
        UserError: settings or data are invalid, another script runs the training, or the training failed.
        Stopped: SIGTERM stopped the training.
    """
    settings = settings.with_name("train")
    name, storage = settings.name, settings.resources.storage
    folder = Path(storage) / TRAININGS / name
    with run_lock(folder), synced(settings.resources, folder, progress):
        join_cluster(settings.resources, name, log_to_driver=True)
        splits = load_and_check(settings, progress)
        start_ray(settings.resources, log_to_driver=True, name=name)
        uri = tracking_uri(storage, settings.tracking.uri)
        experiment = open_experiment(uri, settings.experiment, storage)
        max_concurrent_trainings(settings.resources)
        check_writable(folder, "the folder of the training")
        if not (folder / SETTINGS).exists():
            write_atomic(folder / SETTINGS, settings.to_yaml())
        tracking: dict[str, str | None] = {"uri": uri, "experiment": experiment, "name": name, "trial": name}
        run_tracked_job(make_job(settings, splits, tracking, str(folder)))
        best = best_checkpoint(folder, settings.tune.metric, settings.tune.mode)
        if best and settings.tracking.model:
            from umbrella.tracking.model_registry import log_best_model  # slow to import, and only needed here

            log_best_model(settings.tracking, uri, folder, best, resume_command(folder))
        then(folder)
    return folder


def run_tracked_job(job: Job) -> None:
    """Run a training that is not part of a sweep, and set the final status of its run in MLflow.

    The first SIGTERM asks the workers to stop; a second one, or the first if there are no workers, stops at once. For
    errors see ``check_unchanged`` and ``run_job``.
    """
    check_unchanged(job)
    folder = Path(job.folder)

    def ask() -> None:
        if not (folder / WORKERS).exists():
            stop()
        (folder / STOP).touch()
        print("SIGTERM: the training will stop after this step and write a checkpoint", file=sys.stderr, flush=True)

    def stop() -> NoReturn:
        raise stopped_without_checkpoint(folder)

    try:
        print("00:00  starting workers", flush=True)
        with on_sigterm(stop), on_sigterm(ask):
            run_job(job)
    except BaseException as error:
        outcomes = {KeyboardInterrupt: ("KILLED", "killed"), Stopped: ("KILLED", "asked to stop")}
        close_run(str(job.tracking["uri"]), folder, *outcomes.get(type(error), ("FAILED", "failed")))
        raise


def check_unchanged(job: Job) -> None:
    """Save the settings and data of a new training; check that those of a resumed training are the same.

    Settings that do not change the training, such as ``resources``, may differ. The metric changes it if ``patience``
    is set.

    Raises:
        UserError: a setting or the data differ, or the version that started the training or wrote one of its
            checkpoints is too old.
    """
    file = Path(job.folder) / BEGUN
    fixed = ("tune.metric", "tune.mode") if job.settings.train.patience else ()
    grids = "evaluate.number_grids"  # metrics depend on it
    free_sections = ("resources", "tune", "tracking", "evaluate", "checkpoint", "output", "compare", *job.unused)
    free = ("data.test", "data.input", "data.loader", "data.prefetch")

    def is_fixed(name: str) -> bool:
        return name in fixed or name.startswith(grids) or (name.split(".")[0] not in free_sections and name not in free)

    now = {k: v for k, v in job.settings.flat().items() if is_fixed(k)}
    now |= {"data.fingerprint": job.data["data.fingerprint"], "name": file.parent.name}
    now = json.loads(json.dumps(now))
    if not file.exists():
        run_key(file.parent)  # first: a machine that downloads the folder needs the key
        write_version(file.parent)
        file.write_text(json.dumps(now, indent=1), encoding="utf-8")
        return
    for place in (*complete_checkpoints(file.parent), file.parent):
        check_version(place)
    began = Settings().flat() | json.loads(file.read_text(encoding="utf-8"))  # an older version lacks newer settings
    then = json.loads(json.dumps({k: v for k, v in began.items() if is_fixed(k)}))
    differs = [f"{k} was {then.get(k)} and is {now.get(k)}" for k in {**then, **now} if then.get(k) != now.get(k)]
    if differs:
        raise UserError(
            f"name={file.parent.name}: was started with other settings: {'; '.join(differs)}; choose a new name"
        )
