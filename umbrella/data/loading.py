"""The conversations of a run, split by split: where they come from, what the filters leave, what cannot be used."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella.base import UserError
from umbrella.conversations.conversation import Conversation
from umbrella.conversations.files import Problem, Reading, read_conversations

if TYPE_CHECKING:
    from umbrella.config import Settings

Progress = Callable[[Sequence, str], Iterable]
"""(things, what is done with them) to the same things, drawing a bar as they are taken."""
SPLITS = ("train", "validation", "test")


@dataclass
class Intake:
    """What was read: conversations that can be used so far, and every reason why others cannot."""

    splits: dict[str, list[Conversation]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    places: dict[tuple[str, str], str] = field(default_factory=dict)
    """(split, task_id) to "file:line"."""

    def add(self, name: str, reading: Reading) -> None:
        """Take in what was read of a split."""
        self.splits[name] = reading.conversations
        self.problems += reading.problems
        self.notices += reading.notices
        self.places |= {(name, task_id): place for task_id, place in reading.places.items()}

    def set_aside(self, reasons: Mapping[tuple[str, str], Sequence[tuple[str, str]]]) -> None:
        """Take conversations out: (split, task_id) to (field, what is wrong) of each."""
        for name, conversations in self.splits.items():
            for c in conversations:
                self.problems += [
                    Problem(self.places[name, c.task_id], of, what, c.model_dump(mode="json"))
                    for of, what in reasons.get((name, c.task_id), ())
                ]
            self.splits[name] = [c for c in conversations if (name, c.task_id) not in reasons]

    def lines(self) -> list[str]:
        """One line per problem; what is wrong with many samples in the same way is said once, with their number."""
        first: dict[tuple[str, str], Problem] = {}
        for problem in self.problems:
            first.setdefault((problem.field, problem.what), problem)
        counts = Counter((problem.field, problem.what) for problem in self.problems)
        return [
            str(problem) + (f" (and {counted(counts[key] - 1, 'more conversation')})" if counts[key] > 1 else "")
            for key, problem in first.items()
        ]


def read_splits(
    settings: "Settings",
    progress: Progress,
    names: Sequence[str] = ("train", "validation"),
    check_files: bool = True,
) -> Intake:
    """Read splits; without ``data.train``, the phantom cohort's, which is made when it is not there yet.

    Args:
        check_files: look whether each volume file exists.

    Raises:
        UserError: a file or folder that does not exist; a split without a path, or with nothing left after the filters.
    """
    data = settings.data
    own = {name: getattr(data, name) for name in names if getattr(data, name)}
    if not data.train and "validation" in names and (data.validation or data.test):
        raise UserError("data.train is not set, and data.validation or data.test is: name all, or none for the phantom")
    if data.train and not data.validation:
        raise UserError("data.validation is not set: name the conversations that choose the best trial")
    phantom = phantom_folder(settings)
    if not data.train and own.keys() != set(names):
        from umbrella.cohort.phantom import make_cohort

        make_cohort(phantom, settings.cohort, lambda subjects: progress(list(subjects), "making the phantom cohort"))
    intake = Intake()
    for name in names:
        root: str | Path | None = data.root or None
        paths: Sequence[str | Path] = own.get(name, ())
        if not paths and not data.train:
            root, paths = phantom, [phantom / "conversations" / f"{name}.jsonl"]
        if paths:
            reading = read_conversations(paths, root, data.path_map, data.format, settings.modalities, check_files)
            intake.add(name, reading)
    if not intake.problems or any(intake.splits.values()):
        intake.splits = keep(intake.splits, settings)
    for name, problem in shared_subjects(intake):
        if name == "test" and settings.evaluate.allow_shared_subjects:
            intake.notices.append(str(problem))
        else:
            intake.problems.append(problem)
    return intake


def read_input(settings: "Settings") -> Intake:
    """Read the conversations of ``data.input`` as a split "input". Their last answers may be missing.

    Raises:
        UserError: a file or folder that does not exist; nothing is left after the filters.
    """
    data, intake = settings.data, Intake()
    root = data.root or None
    intake.add(
        "input", read_conversations(data.input, root, data.path_map, data.format, settings.modalities, questions=True)
    )
    intake.splits = keep(intake.splits, settings)
    return intake


def keep(splits: Mapping[str, list[Conversation]], settings: "Settings") -> dict[str, list[Conversation]]:
    """What ``data.modality`` and ``data.task_filter`` leave of each split.

    Raises:
        UserError: a split of which nothing is left.
    """
    data = settings.data
    types = {c.task_type for conversations in splits.values() for c in conversations}
    by_type = bool(data.task_filter) and data.task_filter in types

    def wanted(c: Conversation) -> bool:
        if data.modality and any(v.modality != data.modality for v in c.volumes):
            return False
        if by_type:
            return c.task_type == data.task_filter
        return not data.task_filter or bool(re.search(data.task_filter, c.task_id))

    kept = {name: [c for c in conversations if wanted(c)] for name, conversations in splits.items()}
    for name, conversations in kept.items():
        if splits[name] and not conversations:
            filters = [f"data.{of}={getattr(data, of)!r}" for of in ("modality", "task_filter") if getattr(data, of)]
            known = f"there are {', '.join(sorted({v.modality for c in splits[name] for v in c.volumes} | types))}"
            what = f"none of its {len(splits[name])} conversations is left after {' and '.join(filters)}"
            raise UserError(f"data.{name}: {what}; {known}")
    return kept


def count_samples(settings: "Settings") -> dict[str, int]:
    """How many conversations each split has. Nothing is made: a phantom cohort that is not there is only drawn.

    Raises:
        UserError: as ``read_splits``; problems that end a run.
    """
    from umbrella.data.intake import settle

    if settings.data.train or (phantom_folder(settings) / "cohort.json").exists():
        splits = settle(read_splits(settings, lambda things, what: things), settings, write=False)
        return {"train": len(splits.train), "validation": len(splits.validation)}
    from umbrella.cohort.questions import draw_subjects, split_conversations

    subjects = draw_subjects(settings.cohort)
    drawn = {}
    for name in ("train", "validation"):
        samples = split_conversations([s for s in subjects if s.split == name], settings.cohort.seed)
        drawn[name] = [Conversation.model_validate(sample) for sample in samples]
    return {name: len(conversations) for name, conversations in keep(drawn, settings).items()}


def phantom_folder(settings: "Settings") -> Path:
    """Where the phantom cohort lies: a folder per cohort settings, so that another cohort never meets this one."""
    key = hashlib.sha256(settings.cohort.model_dump_json().encode()).hexdigest()[:8]
    return Path(settings.resources.storage).absolute() / f"phantom-{key}"


def counted(number: int, what: str) -> str:
    """So many of them, in words: "1 sample", "2 samples"."""
    return f"{number} {what}" + ("s" if number != 1 else "")


def shared_subjects(intake: Intake) -> Iterator[tuple[str, Problem]]:
    """Each split, and what is wrong where a subject whose answer it asks for is also in a split before it."""
    for name, conversations in intake.splits.items():
        asked = {c.subject_id: c.task_id for c in conversations}
        for other in list(intake.splits)[: list(intake.splits).index(name)]:
            shared = sorted(asked.keys() & {s for c in intake.splits[other] for s in c.subjects})
            if shared:
                place = intake.places[name, asked[shared[0]]]
                theirs = next(c for c in intake.splits[other] if shared[0] in c.subjects)
                what = (
                    f"{shared[0]} is also in data.{other}, at {intake.places[other, theirs.task_id]}"
                    + (f" (and {counted(len(shared) - 1, 'more subject')})" if len(shared) > 1 else "")
                    + "; split by subject, or the score means nothing"
                )
                yield name, Problem(place, "subject_id", what)
