"""Reading of the data splits: conversations, filters, and problems."""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from umbrella.base import ProgressBar, UserError, no_progress, pluralise
from umbrella.conversations.formats import FILE_MISSING
from umbrella.conversations.reading import Problem, read_conversations
from umbrella.conversations.schema import Conversation, most_frequent_answers, questions_of
from umbrella.data.leakage import assign_subjects, find_shared

if TYPE_CHECKING:
    from umbrella.config import Settings

MAX_NUMERIC_CLASSES = 10
"""A target with at most this many distinct whole-number labels may be a classification, if no answer has a digit."""
VARYING = re.compile(
    r"""'(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*" | \d+(?:\.\d+)?
    | (?:^|(?<=\ ))(?:/|[A-Za-z]:[\\/]|\\\\).+?(?=[:;,]\ |\ does\ not\ |\ is\ a\ |\ \(|$)""",
    re.VERBOSE,
)
"""Parts that differ between messages of one kind: quoted values, absolute paths and numbers."""


@dataclass
class Splits:
    """Usable conversations of each split, and the problems of the others."""

    splits: dict[str, list[Conversation]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    locations: dict[tuple[str, str], str] = field(default_factory=dict)
    """(split, task_id) to "file:line"."""
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    """``Example.bucket_length`` of the conversations of each split, of their ``questions`` except in train, int32."""
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """Number of tokens of each training conversation, int32."""
    longest_answer: int = 0
    """Number of tokens of the longest assistant turn in the training split."""
    quarantine: Path | None = None
    """JSON Lines file that lists the bad samples."""

    @property
    def train(self) -> list[Conversation]:
        """The training split."""
        return self.splits.get("train", [])

    @property
    def validation(self) -> list[Conversation]:
        """The validation split."""
        return self.splits.get("validation", [])

    @property
    def test(self) -> list[Conversation]:
        """The test split, if it is needed."""
        return self.splits.get("test", [])

    @property
    def volumes(self) -> set[tuple[str, str]]:
        """(path, modality) of all volumes."""
        return {
            (v.image_path, v.modality)
            for conversations in self.splits.values()
            for c in conversations
            for v in c.volumes
        }

    @property
    def quarantined(self) -> int:
        """Number of bad samples that are left out."""
        return len({problem.where for problem in self.problems})

    @property
    def quarantine_note(self) -> str:
        """The number of bad samples and the file that lists them; "" if there are none."""
        see = f", see {self.quarantine}" if self.quarantine else ""
        return f"{pluralise(self.quarantined, 'sample')} cannot be used{see}" if self.problems else ""

    @property
    def fingerprint(self) -> str:
        """Hash of the training and validation data; see ``fingerprint``."""
        return fingerprint({"train": self.train, "validation": self.validation})

    def read(
        self, name: str, paths: Sequence[str | Path], root: str | Path, settings: "Settings", **options: bool
    ) -> None:
        """Add the conversations, problems and notices of a split. See ``read_conversations``."""
        data = settings.data
        reading = read_conversations(paths, root or None, data.path_map, data.format, settings.modalities, **options)
        self.splits[name] = reading.conversations
        self.problems += reading.problems
        self.notices += reading.notices
        self.locations |= {(name, task_id): place for task_id, place in reading.locations.items()}

    def exclude(self, reasons: Mapping[tuple[str, str], Sequence[tuple[str, str]]]) -> None:
        """Remove conversations and record their problems. ``reasons``: (split, task_id) to (field, message) pairs."""
        for name, conversations in self.splits.items():
            for c in conversations:
                self.problems += [
                    Problem(self.locations[name, c.task_id], key, message, c.model_dump(mode="json"))
                    for key, message in reasons.get((name, c.task_id), ())
                ]
            self.splits[name] = [c for c in conversations if (name, c.task_id) not in reasons]

    def problem_lines(self) -> list[str]:
        """Return one line per kind of problem: the first problem, the number of others, and some of their names."""
        kinds: dict[tuple[str, str], list[Problem]] = {}
        for problem in self.problems:
            message = VARYING.sub(lambda match: _first_folder(match[0]) or "#", problem.message)
            kinds.setdefault((re.sub(r"\.\d+", ".#", problem.field), message), []).append(problem)
        return [_summarise(problems) for problems in kinds.values()]


def fingerprint(splits: Mapping[str, Sequence[Conversation]]) -> str:
    """Return a hash of all conversations and of the file name and size, not the folder, of each volume."""
    digest, size = hashlib.sha256(), cache(os.path.getsize)  # a network drive needs milliseconds for each file
    for split, conversations in splits.items():
        for conversation in conversations:
            content = conversation.model_dump(mode="json") | {"split": split}
            content["images"] = [(os.path.basename(v.image_path), size(v.image_path)) for v in conversation.volumes]
            for turn in content["conversations"]:
                for item in turn["content"]:
                    item.pop("image_path", None)
            digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _first_folder(value: str) -> str:
    """Return the first folder or drive of an absolute path, and otherwise an empty string."""
    match = re.match(r"/[^/]*/|[A-Za-z]:|\\\\[^\\]*", value)
    return match[0] if match else ""


def _summarise(problems: Sequence[Problem]) -> str:
    first, samples = problems[0], len({problem.where for problem in problems})
    others = pluralise(samples - 1, "more conversation") if samples > 1 else f"{len(problems) - 1} more there"
    values = zip(*(VARYING.findall(problem.message) for problem in problems), strict=False)
    names = next((found for value in values if len(found := list(dict.fromkeys(value))) > 1), [])
    if not names:
        return f"{first} (and {others})" if len(problems) > 1 else str(first)
    if not all(map(_first_folder, names)):
        return f"{first} (and {others}, next {', '.join(names[1:3])})"
    paths = [name.replace("\\", "/").split("/") for name in names]
    common = os.path.commonprefix([path[:-1] for path in paths])  # noqa: RUF071  # of lists
    folder, names = "/".join(common), ["/".join(path[len(common) :]) for path in paths]
    if first.message.endswith(FILE_MISSING):
        listed = f"{len(names)} files below {folder} do not exist, first {', '.join(names[:3])}"
        remedy = f"data.path_map={{{folder}: /your/folder}}, or data.root for relative paths"
        return str(replace(first, message=f"{listed}; {remedy}"))
    return f"{first} (and {others} below {folder}, next {', '.join(names[1:3])})"


def read_splits(
    settings: "Settings",
    progress: ProgressBar,
    names: Sequence[str] = ("train", "validation"),
    check_files: bool = True,
    dry_run: bool = False,
) -> Splits:
    """Read splits. Without ``data.train``, read the phantom cohort, and make it first if it does not exist.

    Args:
        names: names of the splits to read.
        check_files: check that each volume file exists.
        dry_run: do not make a phantom cohort; return its conversations without volumes.

    Raises:
        UserError: a file or folder does not exist, a split has no path, or the filters leave nothing of a split.
    """
    data, raw = settings.data, Splits()
    if not data.train and "validation" in names and (data.validation or data.test):
        raise UserError("data.train is not set, and data.validation or data.test is: name all, or none for the phantom")
    if data.train and not data.validation:
        raise UserError("data.validation is not set: name the conversations that choose the best trial")
    phantom = phantom_folder_of(settings)
    if not data.train and not all(getattr(data, name) for name in names):
        from umbrella.cohorts.phantom import is_made, make_cohort

        if dry_run and not is_made(phantom, settings.cohort):
            with TemporaryDirectory() as temporary:
                folder = make_cohort(Path(temporary) / phantom.name, settings.cohort, progress, volumes=False)
                for name in names:
                    raw.read(name, [folder / "conversations" / f"{name}.jsonl"], folder, settings)
            raw.splits = filter_splits(raw.splits, settings)
            return raw
        make_cohort(phantom, settings.cohort, progress)
    for name in names:
        paths: Sequence[str | Path] = getattr(data, name)
        root: str | Path = data.root
        if not paths and not data.train:
            paths, root = [phantom / "conversations" / f"{name}.jsonl"], phantom
        if paths:
            raw.read(name, paths, root, settings, check_files=check_files, allow_blank_answers=name != "train")
    if not raw.problems or any(raw.splits.values()):
        raw.splits = filter_splits(raw.splits, settings)
    _check_answers(raw, settings, progress)
    raw.notices += assign_subjects(raw.splits, progress)
    if data.group and raw.train and not any(c.group(data.group) for of_one in raw.splits.values() for c in of_one):
        raise UserError(f"data.group={data.group}: no sample has this key in its metadata; correct it or leave it out")
    shared, notices = find_shared(raw.splits, raw.locations, data.group)
    raw.notices += notices
    raw.notices += sorted(
        f"data.{name}: every label of {target!r} is {labels.pop()!r}, so it has no balanced accuracy"
        for name in raw.splits.keys() - {"train"}
        for target, labels in target_classes(raw.splits[name]).items()
        if len(labels) == 1
    )
    for name, problem in shared:
        if name == "test" and settings.evaluate.allow_shared_subjects:
            raw.notices.append(str(problem))
        else:
            raw.problems.append(problem)
    return raw


def _check_answers(raw: Splits, settings: "Settings", progress: ProgressBar) -> None:
    """Compare last answers and labels with the training split; exclude contradictions and add notices.

    A held-out sample with a label and a blank last answer gets the most frequent answer of that label.
    """
    blank = {(name, c.task_id) for name, cs in raw.splits.items() for c in cs if not c.is_answered}
    training = raw.train
    if blank and "train" not in raw.splits:
        training = read_splits(settings, progress, ("train",), check_files=False).train
    usual = most_frequent_answers(training)
    frequencies = Counter((c.target, c.label, c.answer) for c in questions_of(training))
    reasons: dict[tuple[str, str], list[tuple[str, str]]] = {}
    filled: Counter[str] = Counter()
    for name, conversations in raw.splits.items():
        for i, c in enumerate(conversations):
            if (name, c.task_id) in blank:
                texts: Mapping[Any, str] = c.candidates or usual.get(c.target, {})
                if c.label in texts:
                    conversations[i] = c.with_answer(texts[c.label])
                    filled[name] += 1
                else:
                    message = (
                        f"the last answer is empty, and data.train answers no sample of {c.target!r} with the label"
                        f" {c.label!r}; write the answer"
                    )
                    reasons[name, c.task_id] = [("conversations", message)]
            for q in conversations[i].questions():
                texts = q.candidates or usual.get(q.target, {})
                if not isinstance(q.label, str) or texts.get(q.label, q.answer) == q.answer:
                    continue
                frequency = frequencies[q.target, q.label, q.answer]
                others = [label for label, text in texts.items() if text == q.answer and label != q.label]
                if any(q.candidates or frequencies[q.target, label, q.answer] > frequency for label in others):
                    message = (
                        f"the label is {q.label!r}, but the answer {q.answer!r} is that of the label {others[0]!r};"
                        " correct one of them"
                    )
                    field = "metadata.subject_label" if q is conversations[i] else "metadata.labels"
                    reasons.setdefault((name, c.task_id), []).append((field, message))
    raw.exclude(reasons)
    for name, count in filled.items():
        remedy = "each gets the usual answer of its label in data.train"
        raw.notices.append(f"data.{name}: {pluralise(count, 'sample')} with an empty last answer; {remedy}")
    raw.notices += _doubtful_labels(training)


def _doubtful_labels(conversations: Sequence[Conversation]) -> Iterator[str]:
    """Yield a notice for each target with numbers written as text, or with classes written as numbers."""
    conversations = questions_of(conversations)
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
        few = len(numbers) <= MAX_NUMERIC_CLASSES and all(float(number).is_integer() for number in numbers)
        if numbers and (numbers <= {0, 1} or (few and target not in with_digits)):
            listed = ", ".join(f"{number:g}" for number in sorted(numbers, key=float))
            what = f"{pluralise(len(of_target) - len(texts), 'label')} of {target!r} are the numbers {listed}"
            yield f'{what}, so it is a regression; for classes write their names as text, as in "male"'


def read_input(settings: "Settings") -> Splits:
    """Read the conversations of ``data.input`` as the split "input". Their last answers may be missing."""
    raw = Splits()
    raw.read("input", settings.data.input, settings.data.root, settings, allow_unanswered=True)
    raw.splits = filter_splits(raw.splits, settings)
    raw.notices += assign_subjects(raw.splits, no_progress)
    return raw


def filter_splits(splits: Mapping[str, list[Conversation]], settings: "Settings") -> dict[str, list[Conversation]]:
    """Apply ``data.modality`` and ``data.task_filter`` to each split. Raises UserError if nothing is left of one."""
    data = settings.data
    types = {c.task_type for conversations in splits.values() for c in conversations}

    def is_selected(c: Conversation) -> bool:
        if data.modality and any(v.modality != data.modality for v in c.volumes):
            return False
        if data.task_filter and data.task_filter in types:
            return c.task_type == data.task_filter
        return bool(re.search(data.task_filter, c.task_id))  # an empty pattern matches

    kept = {name: [c for c in conversations if is_selected(c)] for name, conversations in splits.items()}
    for name, conversations in kept.items():
        if splits[name] and not conversations:
            used = {"modality": data.modality, "task_filter": data.task_filter}
            filters = [f"data.{key}={value!r}" for key, value in used.items() if value]
            known = sorted({v.modality for c in splits[name] for v in c.volumes} | types)
            raise UserError(
                f"data.{name}: none of its {len(splits[name])} conversations is left after {' and '.join(filters)};"
                f" there are {', '.join(known)}"
            )
    return kept


def phantom_folder_of(settings: "Settings") -> Path:
    """Return the folder of the phantom cohort; each set of cohort settings has its own folder."""
    key = hashlib.sha256(settings.cohort.model_dump_json().encode()).hexdigest()[:8]
    return Path(settings.resources.storage).absolute() / f"phantom-{key}"


def target_classes(conversations: Iterable[Conversation]) -> dict[str, set[str]]:
    """Return the class labels of each target."""
    classes: dict[str, set[str]] = defaultdict(set)
    for c in questions_of(conversations):
        if isinstance(c.label, str):
            classes[c.target].add(c.label)
    return classes
