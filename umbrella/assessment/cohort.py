"""The questions of ``data.input``, answered into one file by a checkpoint, however often that is stopped."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbrella.assessment.answers import AnswerFile, key_of
from umbrella.base import ProgressBar, Stopped, UserError, note
from umbrella.config import Settings
from umbrella.conversations.schema import Conversation
from umbrella.data.ingest import Splits, apply_bad_sample_policy, check_splits, fingerprint
from umbrella.data.splits import RawSplits, read_input
from umbrella.fileio import check_writable
from umbrella.paths import predictions_file
from umbrella.sigterm import on_sigterm

DECIDES = ("generate", "max_new_tokens", "candidates")
"""Settings of ``evaluate`` that decide what an answer is."""
WEIGHED = ("*.safetensors", "*.json", "*.jinja", "*.model")
"""Files of a checkpoint that do."""


@dataclass
class Cohort:
    """Questions that were read, and the file of their answers."""

    checkpoint: Path
    settings: Settings
    """The person's, with the model, modalities and limits of the checkpoint."""
    raw: RawSplits
    answers: AnswerFile

    @property
    def conversations(self) -> list[Conversation]:
        """Those that can be used so far."""
        return self.raw.splits["input"]

    def left(self) -> list[Conversation]:
        """Those that are not answered yet, in their order. Raises as ``AnswerFile.answered``."""
        answered = self.answers.answered({c.task_id for c in self.conversations})
        return [c for c in self.conversations if c.task_id not in answered]


def read_cohort(checkpoint: Path, settings: Settings, own: Settings) -> Cohort:
    """Read the questions of ``data.input``, and what is in the output already. Writes nothing.

    Args:
        own: those of the checkpoint, see ``evaluation.trained``.

    Raises:
        UserError: a question that cannot be used, as ``data.on_bad`` says; an output that is of something else.
    """
    evaluate = settings.evaluate
    if not evaluate.generate and not evaluate.candidates:
        raise UserError("evaluate.generate=false leaves nothing to ask; set evaluate.candidates")
    from umbrella.evaluation.scoring import check_labels  # torch takes seconds

    check_labels(evaluate.candidates)
    limits = {name: getattr(own.data, name) for name in ("max_tokens", "max_voxels")}
    changes = {"modalities": own.modalities, "model": own.model, "data": settings.data.model_copy(update=limits)}
    settings = settings.model_copy(update=changes)
    raw = read_input(settings)
    apply_bad_sample_policy(raw, settings, write=False)
    questions = {"name": " ".join(settings.data.input), "content": fingerprint(raw.splits)}
    about: dict[str, Any] = {
        "checkpoint": {"name": str(checkpoint), "content": weigh(checkpoint)},
        "data.input": questions,
        "model.dtype": own.model.dtype,
    }
    about |= {f"evaluate.{name}": getattr(evaluate, name) for name in DECIDES}
    place = settings.output or predictions_file(settings.resources.storage, key_of(about))
    return Cohort(checkpoint, settings, raw, AnswerFile(Path(place), about))


def answer(cohort: Cohort, progress: ProgressBar) -> Splits:
    """Ask what is not answered yet, part by part into the file; returns the checked splits.

    Raises:
        UserError: a volume that cannot be used, as ``data.on_bad`` says; else as ``stream``.
        Stopped: SIGTERM came.
    """
    from umbrella.assessment.stream import stream
    from umbrella.evaluation.metrics import notes_on
    from umbrella.evaluation.predictions import read_predictions
    from umbrella.evaluation.scoring import find_numbers
    from umbrella.training.cluster import join_cluster

    settings, raw, path = cohort.settings, cohort.raw, cohort.answers.path
    check_writable(path.parent, f"output={path}")

    def stop() -> None:
        raise Stopped(f"SIGTERM: what was answered is in {path}; the same command goes on")

    with on_sigterm(stop):
        join_cluster(settings.resources, log_to_driver=False, name=settings.name)
        splits = check_splits(raw, settings, progress)
        numbers, candidates = find_numbers(cohort.conversations), settings.evaluate.candidates
        with cohort.answers.opened() as file:
            left = cohort.left()
            for predictions in stream(
                left, cohort.checkpoint, settings, candidates, numbers, truth=False, progress=progress
            ):
                file.write(predictions)
    for line in notes_on(read_predictions(path)):
        note(line)
    return splits


def weigh(checkpoint: Path) -> str:
    """Names a checkpoint by what is in it, wherever it lies: a hash of its weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in WEIGHED for file in checkpoint.rglob(pattern)}):
        digest.update(f"{file.relative_to(checkpoint)} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()[:16]
