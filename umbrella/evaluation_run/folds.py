"""Cross-validation: the best settings of a sweep are trained on each fold, and one report covers all held-out subjects.

Folds are the folders ``fold-1`` to ``fold-K`` that ``umbrella make-conversations --folds K`` writes.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ray
from rich.console import Console

from umbrella.base import ProgressBar, Stopped, UserError, note, pluralise
from umbrella.config import Settings, load_settings
from umbrella.conversations.schema import SPLITS, Conversation, questions_of
from umbrella.data.splits import fingerprint, read_splits
from umbrella.evaluation.calibration import calibrate
from umbrella.evaluation.controls import AS_ASKED, CONDITIONS
from umbrella.evaluation.group_metrics import tabulate
from umbrella.evaluation.image_use import measure_image_use
from umbrella.evaluation.metrics import prediction_notes
from umbrella.evaluation.predictions import Prediction, read_predictions
from umbrella.evaluation.report import EvaluationResult, predictions_file, print_evaluation, write_evaluation
from umbrella.evaluation_run.evaluate import evaluate_at_end, log_to_mlflow
from umbrella.fileio import check_writable
from umbrella.html import relative_link
from umbrella.paths import BEST, EVALUATIONS, FOLDS, REPORT
from umbrella.training.checkpoint_files import best_checkpoint
from umbrella.training.run import run_training

FOLD = "fold"
"""The key of metadata by which the report shows each fold."""


def fold_settings(settings: Settings, trial: str = "") -> list[Settings]:
    """Return the settings of the training on each fold.

    Args:
        settings: of a training on one of the folds.
        trial: id of the best trial of the sweep; the trainings are named ``<trial>-fold-<i>``.

    Raises:
        UserError: the data are not those of a fold.
    """
    names = {split: [Path(path).name for path in getattr(settings.data, split)] for split in SPLITS}
    folders = {Path(path).absolute().parent for split in SPLITS for path in getattr(settings.data, split)}
    numbers = {
        path: int(found[1])
        for folder in folders
        for path in folder.parent.glob(f"{FOLD}-*")
        if (found := re.fullmatch(rf"{FOLD}-(\d+)", path.name))
    }
    if len(folders) != 1 or not folders <= numbers.keys() or not all(names.values()):
        raise UserError(
            "--folds: data.train, data.validation and data.test are not in one folder fold-1, fold-2, ...; let"
            " umbrella make-conversations --folds 5 write the data, and give its data.yaml"
        )
    return [
        settings.with_values(
            {
                **{f"data.{split}": [str(folder / name) for name in files] for split, files in names.items()},
                "evaluate.split": "test",
                "evaluate.at_end": True,
                "tracking.model": False,
                "name": trial and f"{trial}-{folder.name}",
            }
        )
        for folder in sorted(numbers, key=numbers.__getitem__)
    ]


def read_held_out(folds: Sequence[Settings], progress: ProgressBar) -> list[Conversation]:
    """Read the questions of the test splits of all folds.

    Args:
        folds: see ``fold_settings``.

    Raises:
        UserError: a file cannot be read, or a subject is not in exactly one of these splits.
    """
    held_out: list[Conversation] = []
    times: Counter[str] = Counter()
    for fold in folds:
        splits = read_splits(fold, progress, ("test",) if times else SPLITS, check_files=False).splits
        for split, conversations in splits.items():
            times.update(dict.fromkeys((c.subject_id for c in conversations), int(split == "test")))
        held_out += questions_of(splits["test"])
    if wrong := sorted(subject for subject, number in times.items() if number != 1):
        raise UserError(
            f"--folds: {len(wrong)} of {pluralise(len(times), 'subject')} are not in the test split of exactly one"
            f" fold, first {wrong[0]} (in {times[wrong[0]]}); write all folds again with umbrella make-conversations"
        )
    return held_out


def evaluate_folds(sweep: Path, trial: str, progress: ProgressBar, console: Console) -> None:
    """Train the best settings of a sweep on each fold, and evaluate the predictions for all test splits together.

    Each fold is a training and an evaluation of its own. Those that are complete are not repeated. The metrics of the
    report over all folds are logged to the MLflow run of the sweep.

    Args:
        sweep: folder of a finished sweep.
        trial: id of its best trial.

    Raises:
        UserError: see ``read_held_out``, ``run_training`` and ``evaluate``.
        Stopped: SIGTERM stopped a training or an evaluation.
    """
    best = sweep / BEST
    chosen = load_settings([best])
    folds, evaluations = fold_settings(chosen, trial), Path(chosen.resources.storage) / EVALUATIONS
    folder = evaluations / f"{sweep.name}{FOLDS}"
    check_writable(folder, "the folder of the evaluation of all folds")
    to_do = [fold for fold in folds if not (evaluations / fold.name / REPORT).exists()]
    if to_do:
        ray.shutdown()  # the trainings start it again, so that the lines of their workers are printed
    for number, fold in enumerate(to_do, start=1):
        print(f"training {number} of {len(to_do)} on folds: {fold.name}", flush=True)
        _train_and_evaluate(fold, sweep.name, progress, console)
    held_out = read_held_out(folds, progress)
    predictions: dict[str, list[Prediction]] = defaultdict(list)
    for fold in folds:
        for condition in (AS_ASKED, *dict.fromkeys(fold.evaluate.controls)):
            answers = read_predictions(predictions_file(evaluations / fold.name, condition))
            predictions[condition] += [replace(p, metadata={**p.metadata, FOLD: _fold_of(fold)}) for p in answers]
    settings = chosen.with_values(
        {
            "name": folder.name,
            "data.test": [path for fold in folds for path in fold.data.test],
            "evaluate.breakdown": [*chosen.evaluate.breakdown, FOLD],
        }
    )
    # Without training labels, references such as the mean label are those of all subjects, who are all in training
    # splits of other folds.
    groups = {c: tabulate(predictions[c], settings.evaluate, settings.seed) for c in CONDITIONS if c in predictions}
    facts: dict[str, str | int] = {"folds": len(folds), "data fingerprint": fingerprint({"test": held_out})}
    notes = [
        f"the settings were chosen on {_fold_of(chosen)}: its training and validation subjects are the test subjects of"
        " the other folds (there is no nested selection), so the result may be slightly optimistic",
        *prediction_notes(predictions[AS_ASKED]),
    ]
    if missing := len(held_out) - len(predictions[AS_ASKED]):
        notes.append(f"{missing} of {len(held_out)} questions have no answer; the reports of the folds say why")
    for line in notes:
        note(line)
    image_use = measure_image_use(predictions, settings.evaluate, settings.seed)
    calibration = calibrate(predictions[AS_ASKED], {}, settings.evaluate, settings.seed)
    result = EvaluationResult(settings, str(best), "test", predictions, groups, facts, notes, image_use, calibration)
    result = replace(result, name=sweep.name, links={"report of the sweep": relative_link(sweep / REPORT, folder)})
    page = write_evaluation(folder, result, ())
    log_to_mlflow(result, folder, held_out)
    print_evaluation(result, page, console)


def _fold_of(settings: Settings) -> str:
    """Return the name of the fold whose data these are."""
    return Path(settings.data.test[0]).absolute().parent.name


def _train_and_evaluate(fold: Settings, sweep: str, progress: ProgressBar, console: Console) -> None:
    def evaluate(folder: Path) -> None:
        checkpoint = best_checkpoint(folder, fold.tune.metric, fold.tune.mode)
        if checkpoint is None:
            raise UserError(f"{folder}: no checkpoint has a {fold.tune.metric}")
        evaluate_at_end(fold, checkpoint, fold.name, progress, console)

    try:
        run_training(fold, progress, evaluate)
    except Stopped:
        raise Stopped(f"SIGTERM: stopped in {fold.name}; umbrella tune --resume {sweep} --folds continues") from None
