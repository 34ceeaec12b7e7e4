"""A sweep: many trainings with Ray Tune, from settings to a ranked result. MLflow gets a run per trial."""

import logging
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import joblib
import torch
from ray import tune
from ray.tune.search import Searcher
from rich.console import Console

from umbrella.base import ProgressBar, Stopped, UserError, mask_secrets, no_progress, on_sigterm, pluralise
from umbrella.cluster import SPARE_CPUS, join_cluster, max_concurrent_trainings, start_ray
from umbrella.config import Settings
from umbrella.data.splits import target_classes
from umbrella.evaluation.metrics import chance_level
from umbrella.fileio import check_writable, run_lock
from umbrella.paths import REPORT, SETTINGS, SWEEPS, TRIALS, storage_of
from umbrella.tracking.mlflow_logger import DESCRIPTION, MlflowLogger, close_run
from umbrella.tracking.provenance import headline_settings, read_salt, redact_subjects
from umbrella.tracking.store import open_experiment, tracking_uri
from umbrella.training.checkpoint_sync import is_uploaded, synced
from umbrella.training.run import load_and_check, make_job
from umbrella.training.task import Job
from umbrella.tuning.monitor import Monitor, OutOfTime
from umbrella.tuning.report import SweepResult, describe_sweep, trial_tags, write_report
from umbrella.tuning.results import best_trial, chance_warning, rank_configurations, ranked_trials, read_trials
from umbrella.tuning.search import count_trials, list_points, make_optuna_search, make_scheduler
from umbrella.tuning.search_space import Parameter, contains, format_point, is_fixed, read_space, variants
from umbrella.tuning.sweep_files import SweepSpec, allow_retry, check_fingerprint, save_spec
from umbrella.tuning.trial import run_trial

RAY_TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # disables Ray Tune's own progress table
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # otherwise fit() returns normally after Ctrl-C
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # interval of saving the state of the sweep; 10 s by default
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "300",  # time for the last checkpoint of a stopped trial
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
"""Environment variables of Ray Tune, used unless they are already set."""


def run_sweep(
    settings: Settings,
    fixed: frozenset[str] = frozenset(),
    progress: ProgressBar = no_progress,
    folder: Path | None = None,
    on_result: Callable[[SweepResult], None] = lambda result: None,
    before_upload: Callable[[SweepResult], None] = lambda result: None,
) -> SweepResult:
    """Run all trials of ``tune.space`` and rank them.

    Args:
        fixed: names set on the command line; they are not swept.
        progress: wraps slow preparations in a progress bar.
        folder: of a sweep with these settings that is resumed. Trials that have ended do not run again; interrupted
            trials continue from their checkpoints.
        on_result: called with the result before the best checkpoint is logged as a model, which is slow and may fail.
        before_upload: called last. Files that it writes into the folder of the sweep are uploaded, too.

    Raises:
        UserError: settings or data are not valid, another script runs this sweep, or no trial succeeded.
        Stopped: the process received SIGTERM.
    """
    resumes = folder is not None
    settings = settings.with_name("sweep")
    folder = folder or Path(settings.resources.storage) / SWEEPS / settings.name
    with run_lock(folder):
        if not resumes and ((folder / SETTINGS).exists() or is_uploaded(settings.resources, folder)):
            name = folder.name
            raise UserError(f"name={name}: this sweep exists; resume it with --resume {name}, or choose another name")
        with synced(settings.resources, folder, progress):
            result = _run(settings, fixed, progress, folder, resumes)
            on_result(result)
            if settings.tracking.model and (best := result.trials[0].checkpoint):
                from umbrella.tracking.model_registry import log_best_model  # seconds, which only the end needs

                again = f"umbrella tune --resume {folder.name}"
                log_best_model(settings.tracking, result.tracking_uri, folder, best, again)
            before_upload(result)
    return result


def _run(settings: Settings, fixed: frozenset[str], progress: ProgressBar, folder: Path, resumes: bool) -> SweepResult:
    def stop() -> None:
        raise Stopped(f"SIGTERM: the sweep stopped; umbrella tune --resume {folder.name} resumes it")

    parameters, total, storage = read_space(settings, fixed), count_trials(settings, fixed), storage_of(folder)
    possible = variants(settings, parameters, "mask", "modalities", "model")
    join_cluster(settings.resources, settings.name)
    splits = load_and_check(settings, progress, possible)
    start_ray(settings.resources, log_to_driver=False, name=settings.name)
    check_writable(folder, "the folder of the sweep")
    if resumes:
        check_fingerprint(folder, splits.fingerprint)
    else:
        save_spec(folder, SweepSpec(settings, fixed), splits.fingerprint)
    uri = tracking_uri(storage, settings.tracking.uri)
    experiment = open_experiment(uri, settings.experiment, storage)
    concurrent = max_concurrent_trainings(settings.resources)

    parent = MlflowLogger.start(uri, experiment, folder.name, trial=folder.name, sweep=folder.name, folder=folder)
    swept, shared = [parameter.name for parameter in parameters], headline_settings(settings, ("baseline",))
    parent.params({k: v for k, v in shared.items() if not any(contains(name, k) for name in swept)})
    parent.artifact(settings.to_yaml(), SETTINGS)
    tracking: dict[str, str | None] = {"uri": uri, "experiment": experiment, "parent": parent.run_id}
    job = make_job(settings, splits, tracking | {"sweep": folder.name}, str(folder))
    parent.params(job.data)
    parent.inputs(job.datasets)
    for trial in folder.glob(f"{TRIALS}/*/"):
        allow_retry(trial)
    monitor = Monitor(folder, parent, total, settings.tune)
    try:
        # On SIGTERM, trials keep their last checkpoints.
        with monitor, on_sigterm(stop):
            try:
                _make_tuner(job, fixed, concurrent, monitor).fit()
            except OutOfTime:
                monitor.stop_all()
        trials = read_trials(folder, settings.tune)
        if settings.tracking.hash_subjects:  # the report is uploaded to MLflow
            salt = read_salt(storage)
            subjects = {subject for c in (*splits.train, *splits.validation) for subject in c.subjects}
            trials = [replace(t, reason=redact_subjects(t.reason, subjects, salt)) for t in trials]
        configurations = rank_configurations(trials, settings.tune.mode)
        held_out, num_subjects = target_classes(splits.validation), len({c.subject_id for c in splits.validation})
        classes = {target: len(labels) for target, labels in job.candidates.items() if len(held_out[target]) > 1}
        warning = chance_warning(trials, settings.tune, chance_level(settings.tune.metric, classes), num_subjects)
        page = f"{mask_secrets(uri)}/#/experiments/{experiment}/runs/{parent.run_id}" if uri.startswith("http") else ""
        for file in write_report(configurations, settings, folder, num_subjects, warning, page):
            parent.artifact(file.read_bytes(), file.name)
        best = best_trial(configurations)
        if not best:
            raise UserError(
                f"no trial finished an evaluation without failing later; {folder / REPORT} lists the errors"
            )
        best_settings = settings.with_values(best.point)
        parent.results({f"best/{settings.tune.metric}": best.metric or 0.0}, 0)
        for name, tags in trial_tags(configurations, settings.tune.metric).items():
            close_run(uri, folder / TRIALS / name.rpartition("-")[2], "KILLED", "killed", tags=tags)
        description = describe_sweep(configurations, settings.tune, warning)
        parent.tags({"best.trial": best.name, "best.checkpoint": best.checkpoint, DESCRIPTION: description})
        parent.end()
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | Stopped)
        monitor.close()
        if not parent.ended:
            parent.end("KILLED" if stopped else "FAILED", "killed" if stopped else "failed")
        raise
    return SweepResult(configurations, ranked_trials(configurations), best_settings, folder, uri, warning)


def _make_tuner(job: Job, fixed: frozenset[str], concurrent: int, monitor: Monitor) -> tune.Tuner:
    """Make the tuner of a sweep, or restore it. The ``config`` of each trial is a point: dotted names to values."""
    settings, resources, folder = job.settings.tune, job.settings.resources, Path(job.folder)
    for name, value in RAY_TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # hides tracebacks; Monitor prints one line per failure
    # With several workers, the process of a trial waits for them. With a CPU for each, they could block the workers.
    reserved = {"node:__internal_head__": 0.001}
    if resources.single_worker:
        reserved = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    trial = tune.with_resources(tune.with_parameters(run_trial, sweep=job), reserved)
    if tune.Tuner.can_restore(str(folder)) and any(folder.glob("experiment_state-*.json")):
        return tune.Tuner.restore(str(folder), trial, resume_unfinished=True, resume_errored=True)
    search: Searcher | None = None
    if settings.search == "optuna":
        search = make_optuna_search(job.settings, read_space(job.settings, fixed))
    return tune.Tuner(
        trial,
        # A grid search over complete points: Ray Tune saves and restores its state.
        param_space={} if search else tune.grid_search(list_points(job.settings, fixed)),
        tune_config=tune.TuneConfig(
            metric=settings.metric,
            mode=settings.mode,
            num_samples=monitor.total if search else 1,
            search_alg=search,
            max_concurrent_trials=min(concurrent, settings.concurrent or concurrent),
            scheduler=make_scheduler(settings),
            reuse_actors=resources.single_worker,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            callbacks=[monitor],
            failure_config=tune.FailureConfig(max_failures=resources.max_failures),
            verbose=0,
        ),
    )


MAX_TRIALS = 20
"""Maximum number of trials that a dry run lists."""


def dry_run(settings: Settings, fixed: frozenset[str], progress: ProgressBar, console: Console) -> None:
    """Make all checks that precede a run, and print settings, trials, resources, samples, memory and time.

    Args:
        settings: of the sweep; or of a training, which have no search space.
        fixed: names set on the command line; they are not swept.
        progress: wraps slow preparations in a progress bar.
        console: where to print.

    Raises:
        UserError: as ``load_and_check``.
    """
    parameters, tune, resources = read_space(settings, fixed), settings.tune, settings.resources
    is_sweep = bool(tune.space)
    points = [] if tune.search == "optuna" or not is_sweep else list_points(settings, fixed)
    count = (len(points) or count_trials(settings, fixed)) if is_sweep else 1
    possible = variants(settings, parameters, "mask", "modalities", "model") if is_sweep else []
    splits = load_and_check(settings, progress, possible, dry_run=True)

    def show(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    show(f"settings that differ from the defaults:\n{textwrap.indent(settings.changes_to_yaml(), '  ')}")
    if is_sweep:
        show(f"trials: {count} at most; Optuna chooses values from" if not points else f"trials: {count}")
        lines = [format_point(point) for point in points] or [f"{p.name}: {p.description}" for p in parameters]
        for line in lines[:MAX_TRIALS]:
            show(f"  {line}")
        if len(lines) > MAX_TRIALS:
            show(f"  ... and {len(lines) - MAX_TRIALS} more")
        not_swept = [name for name in tune.space if is_fixed(name, fixed)]
        if not_swept:
            show(f"set on the command line, so not swept: {', '.join(not_swept)}")
        never = set(tune.space) - set(not_swept) - {parameter.name for parameter in parameters}
        if never:
            show(f"not swept, because the conditions are never met: {', '.join(sorted(never))}")
        for line in _describe_search(settings, parameters):
            show(line)
    show(f"samples: train {len(splits.train)}, validation {len(splits.validation)}, test {len(splits.test)}")
    most = f"{resources.min_workers} to {resources.workers}" if resources.min_workers else resources.workers
    per_trial = f"{most} workers of {resources.cpus_per_worker:g} CPUs and {resources.gpus_per_worker:g} GPUs"
    show(f"resources: {per_trial} per training, and {SPARE_CPUS:g} CPUs for other processes of Ray")
    concurrent, lacking = 0, None
    if resources.ray_address == "local":
        machine = {"CPU": joblib.cpu_count(), "GPU": torch.cuda.device_count()}
        try:
            concurrent = min(max_concurrent_trainings(resources, [machine]), tune.concurrent or count)
        except UserError as error:
            lacking = error
        show(f"this machine has {machine['CPU']:g} CPUs and {machine['GPU']:g} GPUs: {concurrent} trainings at a time")
    from umbrella.training.estimate import describe_costs  # seconds, of which a run has no need

    for line in describe_costs([settings.with_values(p) for p in points] or [settings] * count, splits, concurrent):
        show(line)
    if lacking:
        raise lacking


def _describe_search(settings: Settings, parameters: Sequence[Parameter]) -> Iterator[str]:
    """Describe search, scheduler, metric and time limit, one line each."""
    tune = settings.tune
    drawn = [parameter.name for parameter in parameters if parameter.kind != "grid"]
    draws = [f"{pluralise(tune.samples, 'draw')} of {', '.join(drawn)}"] if drawn else []
    grids = ["every combination of the grids"] if len(drawn) < len(parameters) else []
    combinations = ", each with ".join(grids + draws) or "the settings without changes"
    optuna = f"Optuna (TPE), {pluralise(tune.samples, 'point')} at most, each proposed from earlier results"
    seeds = f"; {tune.seeds} seeds each, from {settings.seed} on" if tune.seeds > 1 else ""
    yield f"search: {optuna if tune.search == 'optuna' else combinations}{seeds}"
    after = f"after {pluralise(tune.grace, 'evaluation')} each"
    asha = f"ASHA, {after}, keeps the best 1/{tune.reduction} at each rung"
    yield f"early stopping: {asha if tune.scheduler == 'asha' else 'none'}"
    yield f"best trial: {'largest' if tune.mode == 'max' else 'smallest'} {tune.metric}"
    yield f"budget: {f'{tune.hours:g} hours' if tune.hours else 'no time limit'}"
