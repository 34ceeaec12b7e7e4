"""One evaluation: a checkpoint, the conversations that it is asked, and the folder of what it found."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import ray

from umbrella.assessment.assessment import AS_ASKED, Assessment
from umbrella.assessment.cases import Case, draw_cases
from umbrella.assessment.controls import shuffled, text_only
from umbrella.assessment.questions import Questions, read_questions
from umbrella.assessment.report import write_report
from umbrella.assessment.stream import load, stream
from umbrella.assessment.tracked import log
from umbrella.base import ProgressBar, Stopped, UserError, note
from umbrella.config import Settings
from umbrella.conversations.schema import Conversation
from umbrella.data.ingest import open_store
from umbrella.evaluation.metrics import notes_on
from umbrella.evaluation.predictions import Prediction, write_predictions
from umbrella.evaluation.scoring import find_numbers
from umbrella.evaluation.subgroups import tabulate
from umbrella.fileio import check_writable
from umbrella.paths import evaluation_folder
from umbrella.sigterm import on_sigterm
from umbrella.training.cluster import join_cluster


@dataclass(frozen=True)
class Evaluated:
    """An evaluation, and where it lies."""

    assessment: Assessment
    folder: Path
    page: Path


def evaluate(settings: Settings, progress: ProgressBar) -> Evaluated | None:
    """Ask a checkpoint, count, and write and track what was found; None where there is nothing to ask.

    Args:
        settings: see ``questions.settings_for``, and ``of_checkpoint``.

    Raises:
        UserError: as ``read_questions`` and ``stream``; a folder that cannot be written to.
        Stopped: SIGTERM came.
    """
    began, settings = time.monotonic(), settings.named("evaluation")
    name = settings.name
    folder = evaluation_folder(settings.resources.storage, name)
    if settings.output:
        folder = Path(settings.output).absolute()
    check_writable(folder, f"output={folder}")
    with on_sigterm(_stop):
        join_cluster(settings.resources, log_to_driver=False, name=name)
        questions = read_questions(settings, progress)
        if questions is None:
            return None
        predictions, notes = ask(settings, questions, progress)
        told = settings.evaluate
        groups = {
            condition: tabulate(rows, told, settings.seed, questions.training)
            for condition, rows in predictions.items()
        }
        cases = _cases(settings, questions.asked, predictions[AS_ASKED]) if told.pictures else []
        where = f"{settings.resources.gpus_per_worker:g} GPUs" if settings.resources.gpus_per_worker else "CPU"
        facts = {**questions.facts, "processes": f"{told.workers} on {where}"}
        facts |= {"seconds": round(time.monotonic() - began)}
        notes = [*questions.notes, *notes, *notes_on(predictions[AS_ASKED])]
        for line in notes:
            note(line)
        assessment = Assessment(settings, settings.checkpoint, told.split, predictions, groups, facts, notes)
        page = write(folder, assessment, cases)
        log(assessment, folder, questions.asked)
    return Evaluated(assessment, folder, page)


def ask(
    settings: Settings, questions: Questions, progress: ProgressBar
) -> tuple[dict[str, list[Prediction]], list[str]]:
    """Condition to predictions, in the order of the data, and what is to be known of the controls.

    All conditions are asked in one go, since to start the processes takes longer than a small split.
    """
    asked = {AS_ASKED: questions.asked}
    notes: list[str] = []
    for control in dict.fromkeys(settings.evaluate.controls):
        if control == "shuffled":
            asked[control], notes = shuffled(questions.asked, settings.seed)
        else:
            asked[control] = text_only(questions.asked)
    everything = [conversation for conversations in asked.values() for conversation in conversations]
    numbers = find_numbers(questions.asked)
    answered = iter(
        [
            prediction
            for part in stream(
                everything, settings.checkpoint, settings, questions.candidates, numbers, progress=progress
            )
            for prediction in part
        ]
    )
    return {name: [next(answered) for _ in conversations] for name, conversations in asked.items()}, notes


def write(folder: Path, assessment: Assessment, cases: Sequence[Case]) -> Path:
    """Write all files of an evaluation, each there whole or as it was before; returns the page."""
    with TemporaryDirectory(dir=folder, prefix=".") as temporary:
        page = write_report(Path(temporary), assessment, cases)
        for condition, rows in assessment.predictions.items():
            write_predictions(
                Path(temporary) / f"predictions{'' if condition == AS_ASKED else f'_{condition}'}.jsonl", rows
            )
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file == page):  # the page last
            os.replace(file, folder / file.name)
    return folder / page.name


def _cases(settings: Settings, asked: Sequence[Conversation], predictions: Sequence[Prediction]) -> list[Case]:
    """Here, which saves the start of a process, unless the model needs a GPU."""
    about = settings, [c.model_dump_json() for c in asked], list(predictions)
    if settings.resources.gpus_per_worker:
        drawn = ray.get(ray.remote(num_cpus=0, num_gpus=settings.resources.gpus_per_worker)(_draw).remote(*about))
    else:
        drawn = _draw(*about)
    if isinstance(drawn, str):
        raise UserError(drawn)
    return drawn


def _draw(settings: Settings, asked: Sequence[str], predictions: Sequence[Prediction]) -> list[Case] | str:
    """Best and worst cases, or what is wrong."""
    conversations = [Conversation.model_validate_json(one) for one in asked]
    try:
        model = load(settings.checkpoint, settings)
        by_task = {c.task_id: c for c in conversations}
        return draw_cases(model, by_task, open_store(settings), predictions, settings.evaluate)
    except UserError as error:
        return str(error)


def _stop() -> None:
    raise Stopped("SIGTERM: the evaluation stopped, and wrote nothing")
