"""The conversations of a run, split by split: where they come from, what the filters leave, what cannot be used."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella.base import ProgressBar, UserError, pluralise
from umbrella.conversations.images import MISSING
from umbrella.conversations.reading import Problem, Reading, read_conversations
from umbrella.conversations.schema import Conversation, usual_answers
from umbrella.data.leakage import assign_subjects, find_shared
from umbrella.paths import phantom_folder

if TYPE_CHECKING:
    from umbrella.config import Settings

SPLITS = ("train", "validation", "test")
FEW = 10
"""Different whole numbers up to which the labels of a target may be classes, if no answer holds a digit."""
VARYING = re.compile(
    r"""'(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*" | \d+(?:\.\d+)?
    | (?:^|(?<=\ ))(?:/|[A-Za-z]:[\\/]|\\\\).+?(?=[:;,]\ |\ does\ not\ |\ is\ a\ |\ \(|$)""",
    re.VERBOSE,
)
"""What may differ between messages of one kind: quoted values, absolute paths, numbers."""


@dataclass
class RawSplits:
    """What was read: conversations that can be used so far, and every reason why others cannot."""

    splits: dict[str, list[Conversation]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    locations: dict[tuple[str, str], str] = field(default_factory=dict)
    """(split, task_id) to "file:line"."""

    def add(self, name: str, reading: Reading) -> None:
        """Take in what was read of a split."""
        self.splits[name] = reading.conversations
        self.problems += reading.problems
        self.notices += reading.notices
        self.locations |= {(name, task_id): place for task_id, place in reading.locations.items()}

    def exclude(self, reasons: Mapping[tuple[str, str], Sequence[tuple[str, str]]]) -> None:
        """Take conversations out: (split, task_id) to (field, what is wrong) of each."""
        for name, conversations in self.splits.items():
            for c in conversations:
                self.problems += [
                    Problem(self.locations[name, c.task_id], of, what, c.model_dump(mode="json"))
                    for of, what in reasons.get((name, c.task_id), ())
                ]
            self.splits[name] = [c for c in conversations if (name, c.task_id) not in reasons]

    def problem_lines(self) -> list[str]:
        """One line per kind of problem: the first of its kind, how many more there are, and the names of some."""
        kinds: dict[tuple[str, str], list[Problem]] = {}
        for problem in self.problems:
            kind = (
                re.sub(r"\.\d+", ".#", problem.field),
                VARYING.sub(lambda found: _root(found[0]) or "#", problem.what),
            )
            kinds.setdefault(kind, []).append(problem)
        return [_in_one_line(problems) for problems in kinds.values()]


def _root(value: str) -> str:
    """The first folder of an absolute path; empty for what is none. Files below different roots are told apart."""
    found = re.match(r"/[^/]*/|[A-Za-z]:|\\\\[^\\]*", value)
    return found[0] if found else ""


def _in_one_line(problems: Sequence[Problem]) -> str:
    first, places = problems[0], len({problem.where for problem in problems})
    others = (
        f"and {pluralise(places - 1, 'more conversation')}" if places > 1 else f"and {len(problems) - 1} more there"
    )
    values = zip(*(VARYING.findall(problem.what) for problem in problems), strict=False)
    names = next((found for value in values if len(found := list(dict.fromkeys(value))) > 1), [])
    if not names:
        return f"{first} ({others})" if len(problems) > 1 else str(first)
    if not all(map(_root, names)):
        return f"{first} ({others}, next {', '.join(names[1:3])})"
    paths = [name.replace("\\", "/").split("/") for name in names]
    levels = zip(*(path[:-1] for path in paths), strict=False)
    common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    folder, names = "/".join(common), ["/".join(path[len(common) :]) for path in paths]
    if first.what.endswith(MISSING):
        listed = f"{len(names)} files below {folder} do not exist, first {', '.join(names[:3])}"
        remedy = f"data.path_map={{{folder}: /your/folder}}, or data.root for relative paths"
        return str(replace(first, what=f"{listed}; {remedy}"))
    return f"{first} ({others} below {folder}, next {', '.join(names[1:3])})"


def read_splits(
    settings: "Settings",
    progress: ProgressBar,
    names: Sequence[str] = ("train", "validation"),
    check_files: bool = True,
    dry_run: bool = False,
) -> RawSplits:
    """Read splits; without ``data.train``, the phantom cohort's, which is made when it is not there yet.

    Args:
        check_files: look whether each volume file exists.
        dry_run: a phantom cohort that is not there yet is not made: its conversations are, without their volumes.

    Raises:
        UserError: a file or folder that does not exist; a split without a path, or with nothing left after the filters.
    """
    data = settings.data
    own = {name: getattr(data, name) for name in names if getattr(data, name)}
    if not data.train and "validation" in names and (data.validation or data.test):
        raise UserError("data.train is not set, and data.validation or data.test is: name all, or none for the phantom")
    if data.train and not data.validation:
        raise UserError("data.validation is not set: name the conversations that choose the best trial")
    phantom, raw = phantom_folder_of(settings), RawSplits()
    if not data.train and own.keys() != set(names):
        if not dry_run:
            from umbrella.cohorts.phantom import make_cohort

            make_cohort(phantom, settings.cohort, lambda people: progress(list(people), "making the phantom cohort"))
        elif not (phantom / "cohort.json").exists():
            raw.splits = filter_splits(_phantom_conversations(settings, names), settings)
            raw.locations = {(name, c.task_id): "the phantom" for name, cs in raw.splits.items() for c in cs}
            return raw
    for name in names:
        root: str | Path | None = data.root or None
        paths: Sequence[str | Path] = own.get(name, ())
        if not paths and not data.train:
            root, paths = phantom, [phantom / "conversations" / f"{name}.jsonl"]
        if paths:
            where = (paths, root, data.path_map, data.format, settings.modalities)
            raw.add(name, read_conversations(*where, check_files, blank_answers=name != "train"))
    if not raw.problems or any(raw.splits.values()):
        raw.splits = filter_splits(raw.splits, settings)
    _check_answers(raw, lambda: read_splits(settings, progress, ("train",), check_files=False))
    raw.notices += assign_subjects(raw.splits, progress)
    shared, notices = find_shared(raw.splits, raw.locations)
    raw.notices += [*notices, *_single_class_notices(raw)]
    for name, problem in shared:
        if name == "test" and settings.evaluate.allow_shared_subjects:
            raw.notices.append(str(problem))
        else:
            raw.problems.append(problem)
    return raw


def _check_answers(raw: RawSplits, read_training: Callable[[], RawSplits]) -> None:
    """Compare last answers and labels with the training split: set aside what contradicts, note what looks mistaken.

    Held-out samples that have a label and a blank last answer get the usual answer of that label.

    Args:
        read_training: called where a blank answer needs the training split, and that is not part of ``raw``.
    """
    blank = {(name, c.task_id) for name, cs in raw.splits.items() for c in cs if not c.is_answered}
    training = raw.splits.get("train", [])
    if blank and "train" not in raw.splits:
        training = read_training().splits.get("train", [])
    usual = usual_answers(training)
    said = Counter((c.target, c.label, c.answer) for c in training)
    reasons: dict[tuple[str, str], list[tuple[str, str]]] = {}
    filled: Counter[str] = Counter()
    for name, conversations in raw.splits.items():
        for i, c in enumerate(conversations):
            texts = usual.get(c.target, {})
            if (name, c.task_id) in blank:
                if c.label in texts:
                    conversations[i] = c.with_answer(texts[c.label])
                    filled[name] += 1
                else:
                    what = f"the last answer is empty, and data.train answers no sample of {c.target!r} with the label"
                    reasons[name, c.task_id] = [("conversations", f"{what} {c.label!r}; write the answer")]
            elif isinstance(c.label, str) and texts.get(c.label, c.answer) != c.answer:
                frequency = said[c.target, c.label, c.answer]
                others = [label for label in texts if texts[label] == c.answer and label != c.label]
                if any(said[c.target, label, c.answer] > frequency for label in others):
                    what = f"the label is {c.label!r}, but the answer {c.answer!r} is that of the label {others[0]!r}"
                    reasons[name, c.task_id] = [("metadata.subject_label", f"{what}; correct one of them")]
    raw.exclude(reasons)
    for name, count in filled.items():
        what = "with an empty last answer; each gets the usual answer of its label in data.train"
        raw.notices.append(f"data.{name}: {pluralise(count, 'sample')} {what}")
    raw.notices += _doubtful_labels(training)


def _doubtful_labels(conversations: Sequence[Conversation]) -> Iterator[str]:
    """Targets with numbers that are written as texts, or with classes that are written as numbers."""
    labels: dict[str, list[str | float]] = defaultdict(list)
    with_digits = {c.target for c in conversations if re.search(r"\d", c.answer)}
    for c in conversations:
        if c.label is not None:
            labels[c.target].append(c.label)
    for target, of_target in sorted(labels.items()):
        texts = [label for label in of_target if isinstance(label, str)]
        numbers = {label for label in of_target if not isinstance(label, str)}
        if texts and not {*texts} <= {"0", "1"} and all(re.fullmatch(r"\s*[-+]?\d+([.,]\d+)?\s*", t) for t in texts):
            what = f"{pluralise(len(texts), 'label')} of {target!r} are numbers written as text, first {texts[0]!r}"
            yield f"{what}; for a regression write them as numbers, without quotes"
        few = len(numbers) <= FEW and all(float(number).is_integer() for number in numbers)
        if numbers and (numbers <= {0, 1} or (few and target not in with_digits)):
            listed = ", ".join(f"{number:g}" for number in sorted(numbers, key=float))
            what = f"{pluralise(len(of_target) - len(texts), 'label')} of {target!r} are the numbers {listed}"
            yield f'{what}, so it is a regression; for classes write their names as text, as in "male"'


def read_input(settings: "Settings") -> RawSplits:
    """Read the conversations of ``data.input`` as a split "input". Their last answers may be missing.

    Raises:
        UserError: a file or folder that does not exist; nothing is left after the filters.
    """
    data, raw = settings.data, RawSplits()
    root = data.root or None
    raw.add(
        "input", read_conversations(data.input, root, data.path_map, data.format, settings.modalities, questions=True)
    )
    raw.splits = filter_splits(raw.splits, settings)
    raw.notices += assign_subjects(raw.splits, lambda things, what: things)
    return raw


def filter_splits(splits: Mapping[str, list[Conversation]], settings: "Settings") -> dict[str, list[Conversation]]:
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


def _phantom_conversations(settings: "Settings", names: Sequence[str]) -> dict[str, list[Conversation]]:
    """The conversations of the phantom cohort, without its volumes."""
    from umbrella.cohorts.phantom_subjects import draw_subjects, split_conversations

    subjects = draw_subjects(settings.cohort)
    return {
        name: [
            Conversation.model_validate(sample)
            for sample in split_conversations([s for s in subjects if s.split == name], settings.cohort.seed)
        ]
        for name in names
    }


def phantom_folder_of(settings: "Settings") -> Path:
    """Where the phantom cohort lies: a folder per cohort settings, so that another cohort never meets this one."""
    key = hashlib.sha256(settings.cohort.model_dump_json().encode()).hexdigest()[:8]
    return phantom_folder(settings.resources.storage, key)


def _single_class_notices(raw: RawSplits) -> list[str]:
    """A note for each target of which a held-out split has one class, so that there is no balanced accuracy."""
    notes = []
    for name in raw.splits.keys() - {"train"}:
        for target, labels in target_classes(raw.splits[name]).items():
            if len(labels) == 1:
                what = f"every label of {target!r} is {labels.pop()!r}, so it has no balanced accuracy"
                notes.append(f"data.{name}: {what}")
    return sorted(notes)


def target_classes(conversations: Iterable[Conversation]) -> dict[str, set[str]]:
    """Target to its labels that are classes."""
    classes: dict[str, set[str]] = defaultdict(set)
    for c in conversations:
        if isinstance(c.label, str):
            classes[c.target].add(c.label)
    return classes
