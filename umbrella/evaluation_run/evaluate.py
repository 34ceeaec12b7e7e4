"""Evaluate a checkpoint on a split: predictions, controls, metrics, report, and the results in MLflow."""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.exceptions import RayTaskError
from rich.console import Console

from umbrella.base import ProgressBar, Stopped, UserError, no_progress, note, on_sigterm, pluralise
from umbrella.cluster import join_cluster
from umbrella.config import Settings, load_settings
from umbrella.conversations.schema import Conversation, questions_of
from umbrella.data.ingest import check_splits
from umbrella.data.leakage import find_shared
from umbrella.data.splits import fingerprint, read_splits
from umbrella.evaluation.calibration import apply_temperatures, calibrate, read_temperatures
from umbrella.evaluation.candidates import Candidates, check_candidates, check_labels, find_candidates, find_numbers
from umbrella.evaluation.comparison import compare_models, comparison_notes, newest_runs, question_of, read_runs
from umbrella.evaluation.confounds import analyse_confounds, brain_volumes, site_drop
from umbrella.evaluation.controls import AS_ASKED, CONDITION_NAMES, CONDITIONS, make_controls
from umbrella.evaluation.group_metrics import Estimate, Group, main_metrics, tabulate
from umbrella.evaluation.image_use import measure_image_use
from umbrella.evaluation.metrics import prediction_notes
from umbrella.evaluation.predictions import Prediction, write_predictions
from umbrella.evaluation.report import (
    Case,
    EvaluationResult,
    predictions_file,
    print_evaluation,
    write_evaluation,
    write_report,
)
from umbrella.evaluation.subgroups import band_names
from umbrella.evaluation.verdict import is_better_than_chance
from umbrella.evaluation_run.model_card import write_model_card
from umbrella.evaluation_run.prediction_workers import load_model, predict_on_workers
from umbrella.fileio import check_writable
from umbrella.inference.cases import draw_cases
from umbrella.inference.model import load_checkpoint_settings
from umbrella.paths import EVALUATIONS, METRICS, PROGRESS, REPORT, SETTINGS
from umbrella.tracking.mlflow_logger import DESCRIPTION, MlflowLogger, find_run
from umbrella.tracking.provenance import describe_dataset, headline_settings, read_salt, redact_subjects
from umbrella.tracking.store import is_valid_metric, open_experiment, tracking_uri
from umbrella.training.checkpoint_files import read_training_state
from umbrella.training.run import check_model
from umbrella.tuning.sweep_files import describe_trial
from umbrella.volumes.store import open_store


@dataclass(frozen=True)
class EvaluationData:
    """The conversations of the evaluated split, and the labels and answers of the training split."""

    conversations: list[Conversation]
    """With one label each: a conversation with several has been replaced by its ``questions``."""
    candidates: Candidates
    training_labels: Mapping[str, Sequence[str | float]]
    """Target to the labels of the training split."""
    facts: Mapping[str, str | int]
    notes: list[str]
    splits: Mapping[str, Sequence[Conversation]]
    """The questions of the training, validation and evaluated split; without those that cannot be read."""
    left_out: Mapping[str, int]
    """Field with a problem to the number of samples that were left out because of it."""
    runs: Mapping[str, Sequence[Prediction]]
    """See ``comparison.read_runs``; empty without ``compare``."""


def load_evaluation_settings(
    checkpoint: str | Path, files: Sequence[str] = (), overrides: Mapping[str, Any] = {}
) -> Settings:
    """Load the settings that a checkpoint was trained with, updated by settings files and overrides.

    Model and modalities are those of the checkpoint; only ``model.dtype`` can be overridden.

    Raises:
        UserError: the folder is no checkpoint of UMBRELLA; settings are invalid.
    """
    checkpoint = Path(checkpoint)
    load_checkpoint_settings(checkpoint, None)  # first: the settings of an earlier version may be invalid now
    own_file = [checkpoint / SETTINGS] if (checkpoint / SETTINGS).is_file() else []
    settings = load_settings([*own_file, *files], overrides)
    return _with_checkpoint(settings, checkpoint, name=load_settings(files, overrides).name)


def read_evaluation_data(settings: Settings, progress: ProgressBar, volumes: bool = True) -> EvaluationData:
    """Read and check the conversations of ``evaluate.split``.

    Args:
        volumes: read every volume, and write the list of quarantined samples.

    Raises:
        UserError: the split is not set; samples that cannot be used, according to ``data.on_bad``; subjects that are
            also in the training split, unless ``evaluate.allow_shared_subjects``; a label without a candidate answer.
    """
    split, evaluate = settings.evaluate.split, settings.evaluate
    raw = read_splits(settings, progress, (split,))
    if not raw.splits:
        raise UserError(f"data.{split} is not set: name the conversations to ask, or another evaluate.split")
    training = read_splits(settings, progress, ("train",), check_files=False)
    locations = training.locations | raw.locations
    shared, notes = find_shared(training.splits | raw.splits, locations, settings.data.group)
    problems = [str(problem) for _, problem in shared]
    if problems and not evaluate.allow_shared_subjects:
        raise UserError("\n".join(problems) + "; evaluate.allow_shared_subjects=true goes on with a note")
    notes += [*raw.notices, *problems]
    if split == "train":
        notes.append("the evaluated conversations are those that the model was trained on")
    check_model(settings)
    check_splits(raw, settings, progress, dry_run=not volumes)
    if raw.quarantine_note:
        notes.append(raw.quarantine_note)
    conversations = questions_of(raw.splits[split])
    splits = {"train": training.splits["train"]}
    with suppress(UserError):  # only described, in the model card
        splits |= read_splits(settings, progress, ("validation",), check_files=False).splits
    questions = {name: questions_of(of_one) for name, of_one in (splits | raw.splits).items()}
    left_out = Counter(re.sub(r"\.\d+", "", field) for _, field in {(p.where, p.field) for p in raw.problems})
    candidates = {**find_candidates(training.splits["train"], evaluate.number_grids), **evaluate.candidates}
    check_labels(candidates)
    check_candidates(conversations, candidates)
    labels: dict[str, list[str | float]] = defaultdict(list)
    for conversation in questions_of(training.splits["train"]):
        if conversation.label is not None:
            labels[conversation.target].append(conversation.label)
    runs = read_runs(settings.compare, Path(settings.resources.storage) / EVALUATIONS) if settings.compare else {}
    if runs:
        newest_runs(runs, map(question_of, map(Prediction.from_conversation, conversations)))
    facts: dict[str, str | int] = {"data fingerprint": fingerprint(raw.splits)}
    facts["quarantined samples"] = raw.quarantined
    return EvaluationData(conversations, candidates, labels, facts, notes, questions, left_out, runs)


def evaluate(settings: Settings, progress: ProgressBar = no_progress) -> tuple[EvaluationResult, Path]:
    """Evaluate a checkpoint, write the report, and log the results to MLflow.

    Args:
        settings: see ``load_evaluation_settings``.

    Returns:
        (result, path of the page).

    Raises:
        UserError: as ``read_evaluation_data`` and ``predict_on_workers``; a folder that cannot be written to.
        Stopped: SIGTERM was received.
    """
    start, settings = time.monotonic(), settings.with_name("evaluation")
    folder = Path(settings.resources.storage) / EVALUATIONS / settings.name
    if settings.output:
        folder = Path(settings.output).absolute()
    check_writable(folder, f"output={folder}")

    def stop() -> None:
        raise Stopped("SIGTERM: the evaluation stopped, and wrote no report")

    temperatures = read_temperatures(settings.checkpoint, required=settings.evaluate.calibrated)
    with on_sigterm(stop):
        join_cluster(settings.resources, settings.name)
        data, own = read_evaluation_data(settings, progress), settings.evaluate
        predictions, notes = _predict_conditions(settings, data, progress)
        uncalibrated = predictions[AS_ASKED]
        if own.calibrated:
            predictions = {c: apply_temperatures(rows, temperatures) for c, rows in predictions.items()}
        for condition, rows in predictions.items():  # they take longest, so they are kept if an analysis fails
            write_predictions(predictions_file(folder, condition), rows)
        calibration = calibrate(uncalibrated, temperatures, own, settings.seed)
        groups = {
            condition: tabulate(predictions[condition], own, settings.seed, data.training_labels)
            for condition in CONDITIONS
            if condition in predictions
        }
        usage = measure_image_use(predictions, own, settings.seed, data.training_labels)
        shown = with_cases(groups[AS_ASKED], predictions[AS_ASKED]) if own.pictures else []
        cases = _draw_cases(settings, data.conversations, shown) if shown else []
        device = f"{settings.resources.gpus_per_worker:g} GPUs" if settings.resources.gpus_per_worker else "CPU"
        facts = {**data.facts, "processes": f"{own.workers} on {device}", "seconds": round(time.monotonic() - start)}
        notes = [*data.notes, *notes, *prediction_notes(predictions[AS_ASKED])]
        compared = compare_models(predictions[AS_ASKED], data.runs, own, settings.seed) if data.runs else []
        notes += comparison_notes(predictions[AS_ASKED], compared) if data.runs else []
        for line in notes:
            note(line)
        result = EvaluationResult(settings, settings.checkpoint, own.split, predictions, groups, facts, notes, usage)
        result = with_confounds(result, data.splits["train"], data.conversations)
        result = replace(result, calibration=calibration, comparisons=compared, **describe_trial(result.model, folder))
        page = write_evaluation(folder, result, cases)
        write_model_card(folder, result, data.splits, data.left_out)
        log_to_mlflow(result, folder, data.conversations)
    return result, page


def with_confounds(
    result: EvaluationResult, training: Sequence[Conversation], conversations: Sequence[Conversation]
) -> EvaluationResult:
    """Add ``confounds``, ``site_drop`` and notes on confounds that are not used to a result.

    Args:
        training: questions of the training split.
        conversations: of the evaluated split.
    """
    settings, seed = result.settings.evaluate, result.settings.seed
    computed = "brain_volume" in settings.confounds
    volumes = brain_volumes([*training, *conversations], open_store(result.settings)) if computed else {}
    known: dict[str, dict[Any, Conversation]] = defaultdict(dict)
    for c in training:
        if c.label is not None:
            known[c.target].setdefault((c.subject_id, c.label), c)
    confounds, drops = {}, {}
    unused: dict[tuple[str, str], list[str]] = defaultdict(list)
    for target, of_target in sorted(known.items()):
        answers = [p for p in result.predictions[AS_ASKED] if p.target == target and p.label is not None]
        rows = [Prediction.from_conversation(c) for c in of_target.values()]
        sites = {str(row.metadata["site"]) for row in rows if row.metadata.get("site") is not None}
        found, reasons = analyse_confounds(answers, rows, volumes, settings, seed)
        if found:
            confounds[target] = found
        for reason in reasons.items():
            unused[reason].append(target)
        if drop := site_drop(answers, sites, settings, seed):
            drops[target] = drop
    notes = [f"confound {name} is not used for {', '.join(of)}: {why}" for (name, why), of in unused.items()]
    for line in notes:
        note(line)
    return replace(result, confounds=confounds, site_drop=drops, notes=[*result.notes, *notes])


def evaluate_at_end(settings: Settings, checkpoint: Path, name: str, progress: ProgressBar, console: Console) -> None:
    """Run the final evaluation of a training or sweep, if ``evaluate.at_end`` is true and the split is set.

    Args:
        settings: of the training.
        checkpoint: the best one.
        name: of the training or sweep; the folder of the evaluation has the same name.

    Raises:
        UserError: as ``evaluate``.
    """
    split = settings.evaluate.split
    if settings.evaluate.at_end and settings.data.train and not getattr(settings.data, split):
        console.print(f"no evaluation: data.{split} is not set", markup=False, highlight=False)
    elif settings.evaluate.at_end:
        own = _with_checkpoint(settings, checkpoint.absolute(), name=name, output="", compare="")
        print_evaluation(*evaluate(own, progress), console)


def print_plan(settings: Settings, data: EvaluationData, console: Console) -> None:
    """Print what ``evaluate`` would do."""
    own, conversations = settings.evaluate, data.conversations
    number, subjects = (len({getattr(c, key) for c in conversations}) for key in ("conversation_id", "subject_id"))
    ways = "likelihood of candidates" + (" and generated answers" if own.generate else "")
    lines = [
        f"would evaluate {settings.checkpoint}",
        f"{own.split}: {pluralise(number, 'conversation')} about {pluralise(subjects, 'subject')}; {ways}",
        "controls: " + (", ".join(CONDITION_NAMES[control] for control in own.controls) or "none"),
        *(f"compared with {run}" for run in data.runs),
    ]
    for target, number in sorted(Counter(c.target for c in conversations).items()):
        candidates = data.candidates.get(target, {})
        choices = " | ".join(f"{label}: {text}" for label, text in candidates.items())
        if any(isinstance(label, float) for label in candidates):
            first, *_, last = candidates.values()
            choices = f"{len(candidates)} numbers, {first} to {last}"
        lines.append(f"  {target}: {pluralise(number, 'conversation')}" + (f", of {choices}" if choices else ""))
    for line in [*lines, *(f"note: {line}" for line in data.notes)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def log_to_mlflow(result: EvaluationResult, folder: Path, conversations: Sequence[Conversation]) -> None:
    """Log metrics, report and data of an evaluation to the run of the training, or to a new run if there is none.

    With ``tracking.hash_subjects`` the logged report has no pictures and no subject ids.

    Args:
        folder: of the evaluation, with its files.
        conversations: of the evaluated split.
    """
    settings, checkpoint = result.settings, Path(result.model)
    storage = Path(settings.resources.storage).absolute()
    uri = tracking_uri(storage, settings.tracking.uri)
    experiment = open_experiment(uri, settings.experiment, storage)
    training = find_run(uri, checkpoint.parent)
    logger = training or MlflowLogger.start(uri, experiment, f"evaluation of {checkpoint.parent.name}", folder=folder)
    if not training:
        own = {"checkpoint": settings.checkpoint, "evaluate.split": result.split}
        logger.params(headline_settings(settings, ("tune", "baseline")) | own)
        logger.tags({DESCRIPTION: " ".join(f"{name}: {words}" for name, words in result.verdicts.items())})
        logger.artifact(settings.to_yaml(), SETTINGS)
    metrics = mlflow_metrics(result)
    refused = sorted(name for name in metrics if not is_valid_metric(name))
    if refused:
        note(f"MLflow does not accept these metric names, so they are not logged: {', '.join(refused)}")
    paths = getattr(settings.data, result.split)
    logger.inputs([describe_dataset(result.split, conversations, str(result.facts["data fingerprint"]), paths)])
    step = read_training_state(checkpoint).step if (checkpoint / PROGRESS).is_file() else 0
    logger.results({name: value for name, value in metrics.items() if name not in refused}, step)
    with TemporaryDirectory() as temporary:
        if settings.tracking.hash_subjects:
            subjects = {subject for c in conversations for subject in c.subjects}
            folder = Path(temporary)
            write_report(folder, anonymised(result, subjects, read_salt(settings.resources.storage)), ())
        for name in (REPORT, METRICS):
            logger.artifact((folder / name).read_text(encoding="utf-8"), f"evaluation/{name}")
    if not training:
        logger.end()


def mlflow_metrics(result: EvaluationResult) -> dict[str, float]:
    """The metrics that MLflow gets, in the order of their importance; metrics.json has all.

    They are the main metric of each target, ``test/<target>/<way>/<level>/<metric>``, its ``.../low`` and ``.../high``,
    and its values under the controls, ``test_shuffled/...``, ``test_blank/...`` and ``test_text_only/...``. Undefined
    values are left out.
    """
    main: dict[str, dict[str, Estimate]] = {}
    for condition, groups in result.groups.items():
        wholes = [(group, name) for group in groups if group.by == "all" for name in main_metrics(group)[:1]]
        main[condition] = {f"{group.target}/{name}": group.metrics[name] for group, name in wholes}
    own, prefix = main.pop(AS_ASKED), result.split
    metrics = {f"{prefix}/{name}": estimate.value for name, estimate in own.items()}
    metrics |= {f"{prefix}/{name}/{end}": getattr(own[name], end) for name in own for end in ("low", "high")}
    for control, estimates in main.items():
        metrics |= {f"{prefix}_{control}/{name}": estimate.value for name, estimate in estimates.items()}
    return {name: value for name, value in metrics.items() if isfinite(value)}


def anonymised(result: EvaluationResult, subjects: Collection[str], salt: str) -> EvaluationResult:
    """The result with subject ids hashed in the values of subgroups and in notes, and without single questions."""
    # Not on the rendered page: there, an id such as 24 could be any count.
    redact = partial(redact_subjects, subjects=subjects, salt=salt)
    bands = band_names(result.settings.evaluate.bands)
    groups = {
        condition: [replace(g, value=g.value if g.value in bands else redact(g.value)) for g in groups]
        for condition, groups in result.groups.items()
    }
    image_use = {target: replace(use, examples=(), table=()) for target, use in result.image_use.items()}
    return replace(result, groups=groups, notes=[redact(note) for note in result.notes], image_use=image_use)


def _with_checkpoint(settings: Settings, checkpoint: Path, **changes: Any) -> Settings:
    """``settings`` with the model and modalities of the settings that the checkpoint was trained with."""
    own = load_checkpoint_settings(checkpoint, settings.model.dtype)
    # A filter by modality leaves out samples that are read, so the other modalities must be known.
    known = {**(settings.modalities if settings.data.modality in own.modalities else {}), **own.modalities}
    changes |= {"checkpoint": str(checkpoint), "model": own.model, "modalities": known}
    return settings.model_copy(update=changes)


def _predict_conditions(
    settings: Settings, data: EvaluationData, progress: ProgressBar
) -> tuple[dict[str, list[Prediction]], list[str]]:
    """Condition to predictions, in the order of the data, and notes on the controls.

    All conditions share the workers, because to start them takes longer than to predict a small split.
    """
    controls, notes = make_controls(data.conversations, settings.evaluate.controls, settings.seed)
    conditions = {AS_ASKED: data.conversations, **controls}
    conversations = [conversation for of_one in conditions.values() for conversation in of_one]
    numbers = find_numbers(data.conversations)
    parts = predict_on_workers(
        conversations, settings.checkpoint, settings, data.candidates, numbers, progress=progress
    )
    predictions = chain.from_iterable(list(parts))
    return {name: list(islice(predictions, len(of_one))) for name, of_one in conditions.items()}, notes


def with_cases(groups: Sequence[Group], predictions: Sequence[Prediction]) -> list[Prediction]:
    """The predictions of the targets whose best and worst cases are drawn: not of one that is at chance."""
    shown = {g.target for g in groups if g.by == "all" and is_better_than_chance(g) is not False}
    return [p for p in predictions if p.target in shown]


def _draw_cases(
    settings: Settings, conversations: Sequence[Conversation], predictions: Sequence[Prediction]
) -> list[Case]:
    """Draw the best and worst cases: in this process, or in a worker if the model needs a GPU."""
    if not settings.resources.gpus_per_worker:
        return _draw_cases_here(settings, conversations, predictions)
    task = ray.remote(num_cpus=0, num_gpus=settings.resources.gpus_per_worker)(_draw_cases_here)
    try:
        return ray.get(task.remote(settings, conversations, predictions))
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None


def _draw_cases_here(
    settings: Settings, conversations: Sequence[Conversation], predictions: Sequence[Prediction]
) -> list[Case]:
    model = load_model(settings.checkpoint, settings)
    by_task = {c.task_id: c for c in conversations}
    return draw_cases(model, by_task, open_store(settings), predictions, settings.evaluate)
