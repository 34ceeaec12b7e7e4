"""What an evaluation asks: a checkpoint's settings, a split of conversations, and whether it may be asked."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbrella.base import ProgressBar, UserError
from umbrella.config import Settings, load_settings
from umbrella.conversations.schema import Conversation
from umbrella.data.ingest import check_splits, fingerprint
from umbrella.data.leakage import find_shared
from umbrella.data.splits import read_splits
from umbrella.evaluation.scoring import Candidates, check_candidates, check_labels, find_candidates
from umbrella.paths import SETTINGS
from umbrella.training.run import check_model


@dataclass(frozen=True)
class Questions:
    """What a checkpoint is asked, and what of its training data that takes."""

    asked: list[Conversation]
    candidates: Candidates
    training: Mapping[str, Sequence[str | float]]
    """Target to the labels of the training split."""
    facts: Mapping[str, str | int]
    notes: list[str]


def settings_for(checkpoint: Path, files: Sequence[str] = (), overrides: Mapping[str, Any] = {}) -> Settings:
    """The settings that a checkpoint was trained with, and over them what a person has given.

    Model and modalities are those of the checkpoint, whatever is given, but for ``model.dtype``.

    Raises:
        UserError: no checkpoint of UMBRELLA; settings that are refused.
    """
    from umbrella.evaluation.answering import settings_of

    settings_of(checkpoint, None)  # first: the settings of an earlier version may be none of this one
    trained = [checkpoint / SETTINGS] if (checkpoint / SETTINGS).is_file() else []
    settings = load_settings([*trained, *files], overrides)
    own = settings_of(checkpoint, settings.model.dtype)
    name = load_settings(files, overrides).name
    return of_checkpoint(settings.model_copy(update={"name": name}), checkpoint, own)


def of_checkpoint(settings: Settings, checkpoint: Path, own: Settings) -> Settings:
    """Settings with the model and modalities of a checkpoint, whose ``own`` settings these are."""
    changes = {"checkpoint": str(checkpoint), "model": own.model, "modalities": own.modalities}
    return settings.model_copy(update=changes)


def read_questions(settings: Settings, progress: ProgressBar, volumes: bool = True) -> Questions | None:
    """Read what ``evaluate.split`` asks, and check it as trainings check theirs; None where there is no such split.

    Args:
        volumes: also try every volume, and keep the list of what cannot be used.

    Raises:
        UserError: what cannot be used, as ``data.on_bad`` says; subjects who are in the training split, too, unless
            ``evaluate.allow_shared_subjects``; a label that has no candidate.
    """
    split, evaluate = settings.evaluate.split, settings.evaluate
    raw = read_splits(settings, progress, (split,))
    if not raw.splits:
        return None
    training = read_splits(settings, progress, ("train",), check_files=False)
    shared, notes = find_shared(training.splits | raw.splits, training.locations | raw.locations)
    problems = [str(problem) for _, problem in shared]
    if problems and not evaluate.allow_shared_subjects:
        raise UserError("\n".join(problems) + "; evaluate.allow_shared_subjects=true goes on with a note")
    notes += [*raw.notices, *problems]
    if split == "train":
        notes.append("the model was trained on what it is asked here")
    check_model(settings)
    splits = check_splits(raw, settings, progress, dry_run=not volumes)
    if splits.left_out:
        notes.append(splits.left_out)
    asked = raw.splits[split]
    candidates = {**find_candidates(training.splits["train"]), **evaluate.candidates}
    check_labels(candidates)
    check_candidates(asked, candidates)
    labels: dict[str, list[str | float]] = defaultdict(list)
    for conversation in training.splits["train"]:
        if conversation.label is not None:
            labels[conversation.target].append(conversation.label)
    facts: dict[str, str | int] = {
        "data fingerprint": fingerprint(raw.splits),
        "quarantined samples": splits.quarantined,
    }
    return Questions(asked, candidates, labels, facts, notes)
