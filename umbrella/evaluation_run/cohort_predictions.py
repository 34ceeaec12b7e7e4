"""Predictions for the conversations of ``data.input``, written to one file; an interrupted run can be continued."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbrella.base import ProgressBar, Stopped, UserError, note, on_sigterm
from umbrella.cluster import join_cluster
from umbrella.config import Settings
from umbrella.conversations.schema import Conversation, questions_of
from umbrella.data.ingest import apply_bad_sample_policy, check_splits
from umbrella.data.splits import Splits, fingerprint, read_input
from umbrella.evaluation.calibration import apply_temperatures, read_temperatures
from umbrella.evaluation.candidates import check_labels, find_numbers
from umbrella.evaluation.metrics import prediction_notes
from umbrella.evaluation.predictions import Prediction, read_predictions
from umbrella.evaluation_run.prediction_workers import predict_on_workers
from umbrella.fileio import LocksUnavailable, check_writable, lock, write_atomic

EVALUATE_SETTINGS = ("generate", "max_new_tokens", "candidates", "calibrated")
"""Settings of ``evaluate`` that predictions depend on."""
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")
"""Files of a checkpoint that predictions depend on."""


class PredictionFile:
    """A JSON Lines file of predictions that a later run can continue.

    The file ``<name>.about.json`` beside it holds its metadata. A file without metadata cannot be continued.

    Args:
        path: of the file; it need not exist.
        metadata: everything that predictions depend on, as JSON. Of a value with a "content" only that is compared; its
            "name" is shown in messages.

    Raises:
        UserError: the file has other metadata, or none; the path is a folder.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = json.loads(json.dumps(metadata))
        self.metadata_path = path.with_name(f"{path.name}.about.json")
        if path.is_dir():
            raise UserError(f"output={path}: is a folder; name a file, {path / 'predictions.jsonl'} say")
        exists = path.exists() and path.stat().st_size > 0
        if exists and self.metadata_path.exists():
            self._check_metadata()
        elif exists:
            raise UserError(
                f"output={path}: is there already, and {self.metadata_path.name} is not; give another output"
            )

    def predicted(self, known: Collection[str]) -> set[str]:
        """The task_ids of the complete lines. An incomplete last line, left by a killed process, is ignored.

        Raises:
            UserError: a line is no prediction; its task_id is not ``known``, or occurs twice.
        """
        found: set[str] = set()
        if not self.path.exists():
            return found
        remedy = "delete that line, or give another output"
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    task_id = Prediction.from_json(line.decode()).task_id
                except (ValueError, TypeError, KeyError, AttributeError):
                    raise UserError(f"{self.path}:{number}: is no prediction; {remedy}") from None
                if task_id in found or task_id not in known:
                    what = "is there twice" if task_id in found else "is not in data.input"
                    raise UserError(f"{self.path}:{number}: {task_id} {what}; {remedy}")
                found.add(task_id)
        return found

    @contextmanager
    def open(self) -> Iterator[Callable[[Iterable[Prediction]], None]]:
        """Open the file, locked for this process; an incomplete last line is removed. Yields a function that appends.

        Predictions are on the disk when it returns.

        Raises:
            UserError: another process has the lock.
        """
        with self.path.open("ab") as file:
            with suppress(LocksUnavailable):  # without locks, ``predicted`` still finds predictions that occur twice
                if not lock(file):
                    raise UserError(f"output={self.path}: another process is writing to it")
            write_atomic(self.metadata_path, json.dumps(self.metadata, indent=1))
            with self.path.open("rb") as lines:
                os.truncate(self.path, sum(len(line) for line in lines if line.endswith(b"\n")))

            def append(predictions: Iterable[Prediction]) -> None:
                file.write("".join(f"{prediction.to_json()}\n" for prediction in predictions).encode())
                file.flush()
                os.fsync(file.fileno())

            yield append

    def _check_metadata(self) -> None:
        try:
            old, new = json.loads(self.metadata_path.read_text(encoding="utf-8")), self.metadata
            pairs = {name: (old.get(name), new.get(name)) for name in {**old, **new}}
        except (ValueError, AttributeError):
            raise UserError(f"{self.metadata_path}: cannot be read; give another output") from None
        for name, (was, now) in pairs.items():
            if _part(was, "content") != _part(now, "content"):
                was, now = _part(was, "name"), _part(now, "name")
                what = f"{name} was {was} and is {now}" if was != now else f"{name}={now} has changed since"
                raise UserError(f"output={self.path}: was begun with something else: {what}; give another output")


@dataclass
class Cohort:
    """The conversations of ``data.input`` and the file of their predictions."""

    checkpoint: Path
    settings: Settings
    """The user's, with the model, modalities and limits of the checkpoint."""
    splits: Splits
    file: PredictionFile

    @property
    def conversations(self) -> list[Conversation]:
        """Those that are not quarantined, with one label each: see ``Conversation.questions``."""
        return questions_of(self.splits.splits["input"])

    def remaining(self) -> list[Conversation]:
        """The conversations without a prediction, in order. Raises as ``PredictionFile.predicted``."""
        predicted = self.file.predicted({c.task_id for c in self.conversations})
        return [c for c in self.conversations if c.task_id not in predicted]


def read_cohort(checkpoint: Path, settings: Settings, own: Settings) -> Cohort:
    """Read the conversations of ``data.input`` and the existing predictions. Writes nothing.

    Args:
        own: the settings that the checkpoint was trained with, see ``inference.model.load_checkpoint_settings``.

    Raises:
        UserError: a conversation that cannot be used, according to ``data.on_bad``; an existing file of predictions
            that was made with other settings; ``evaluate.calibrated`` with a checkpoint without temperatures.
    """
    evaluate = settings.evaluate
    if not evaluate.generate and not evaluate.candidates:
        raise UserError("evaluate.generate=false leaves nothing to ask; set evaluate.candidates")
    check_labels(evaluate.candidates)
    read_temperatures(checkpoint, required=evaluate.calibrated)
    limits = {name: getattr(own.data, name) for name in ("max_tokens", "max_voxels")}
    changes = {"modalities": own.modalities, "model": own.model, "data": settings.data.model_copy(update=limits)}
    settings = settings.model_copy(update=changes)
    splits = read_input(settings)
    apply_bad_sample_policy(splits, settings, write=False)
    metadata: dict[str, Any] = {
        "checkpoint": {"name": str(checkpoint), "content": hash_checkpoint(checkpoint)},
        "data.input": {"name": " ".join(settings.data.input), "content": fingerprint(splits.splits)},
        "model.dtype": own.model.dtype,
    }
    metadata |= {f"evaluate.{name}": getattr(evaluate, name) for name in EVALUATE_SETTINGS}
    contents = json.dumps({name: _part(value, "content") for name, value in metadata.items()}, sort_keys=True)
    digest = hashlib.sha256(contents.encode()).hexdigest()[:8]
    path = settings.output or Path(settings.resources.storage) / f"predictions-{digest}.jsonl"
    return Cohort(checkpoint, settings, splits, PredictionFile(Path(path), metadata))


def predict_cohort(cohort: Cohort, progress: ProgressBar) -> None:
    """Predict the remaining conversations and append the predictions to the file.

    Raises:
        UserError: a volume that cannot be used, according to ``data.on_bad``; as ``predict_on_workers``.
        Stopped: SIGTERM was received.
    """
    settings, path = cohort.settings, cohort.file.path
    check_writable(path.parent, f"output={path}")

    def stop() -> None:
        raise Stopped(f"SIGTERM: what was answered is in {path}; the same command goes on")

    with on_sigterm(stop):
        join_cluster(settings.resources, settings.name)
        check_splits(cohort.splits, settings, progress)
        temperatures = read_temperatures(cohort.checkpoint) if settings.evaluate.calibrated else {}
        numbers, candidates = find_numbers(cohort.conversations), settings.evaluate.candidates
        with cohort.file.open() as append:
            for predictions in predict_on_workers(
                cohort.remaining(), cohort.checkpoint, settings, candidates, numbers, truth=False, progress=progress
            ):
                append(apply_temperatures(predictions, temperatures))
    for line in prediction_notes(read_predictions(path)):
        note(line)


def hash_checkpoint(checkpoint: Path) -> str:
    """A hash of the weights, configuration and tokenizer of a checkpoint; it does not depend on the path."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in CHECKPOINT_FILES for file in checkpoint.rglob(pattern)}):
        digest.update(f"{file.relative_to(checkpoint)} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()[:16]


def _part(value: Any, part: str) -> Any:
    """The "content" or "name" of a value of the metadata; a value without these is its own."""
    return value.get(part, value) if isinstance(value, dict) else value
