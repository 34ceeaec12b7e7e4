"""Conversation files to conversations, with every problem that there is beside those that can be used."""

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umbrella.base import UserError
from umbrella.conversations.checks import Checker, PathRewriter, peculiarities
from umbrella.conversations.conversation import Conversation
from umbrella.conversations.formats import FORMATS
from umbrella.conversations.json_files import EXTENSIONS, Entry, entries
from umbrella.conversations.wording import plain, show

NAMES = f"name files that end with {', '.join(EXTENSIONS)}"

REPEATED = "the task_id is used before with other content; such samples are numbered: id, id#2, ..."


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a line for the person who can put it right."""

    where: str
    """"file:line", or "file"; samples after the first of a line have their number, "file:1 (sample 2)"."""
    field: str
    """"" where no field is at fault."""
    what: str
    """What is wrong; the remedy."""
    sample: Any = None
    """The raw object or text line when just this sample can be left out; None when the file is in doubt."""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.field, self.what) if part)


@dataclass
class Reading:
    """What a read gave: conversations without any problem, and all problems of the others."""

    conversations: list[Conversation] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    """task_id to "file:line"."""
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    """What is allowed and yet worth knowing, a line each."""


def conversation_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The conversation files behind files, folders (with all below them) and glob patterns (of files; ``**`` too).

    Sorted, each file once. As in a pattern, names with a leading dot are left out of a folder.

    Raises:
        UserError: a path that gives no file, a line for each.
    """
    found: dict[Path, Path] = {}
    problems = []
    several = [paths] if isinstance(paths, (str, Path)) else list(paths)
    for path in map(os.path.expanduser, map(str, several)):
        if os.path.isdir(path):
            files = [p for p in Path(path).rglob("*") if not any(n.startswith(".") for n in p.relative_to(path).parts)]
            nothing = f"no conversation file in this folder; {NAMES}"
        elif os.path.isfile(path):
            files, nothing = [Path(path)], f"not a conversation file; {NAMES}"
        elif glob.has_magic(path):
            files = list(map(Path, glob.glob(path, recursive=True)))
            nothing = f"no conversation file fits this pattern; {NAMES}"
        else:
            files, nothing = [], "no such file or folder; check the path"
        files = [file for file in files if file.name.lower().endswith(EXTENSIONS) and file.is_file()]
        if not files:
            problems.append(f"{plain(path)}: {nothing}")
        for file in sorted(files):
            found.setdefault(file.resolve(), file)
    if problems or not several:
        raise UserError("\n".join(problems) or "no conversation file is named; name at least one")
    return sorted(found.values())


def read_conversations(
    paths: str | Path | Sequence[str | Path],
    root: str | Path | None = None,
    path_map: Mapping[str, str] = {},
    format: str = "auto",
    modalities: Collection[str] | None = None,
    check_files: bool = True,
    questions: bool = False,
    blank_answers: bool = False,
) -> Reading:
    """Read every conversation of some files; problems are collected, not raised. Volume paths become absolute.

    Args:
        paths: as in ``conversation_files``.
        root: what relative volume paths are relative to; the conversation file's own folder when None.
        path_map: old to new beginning of a volume path, in whole names; the longest that fits is used, before ``root``.
        format: that of every sample, one of ``FORMATS``, or "auto" to tell each by its keys.
        modalities: the modality names that the settings know; None accepts all.
        check_files: look whether each volume file exists.
        questions: a sample may end with a user turn, or with a blank assistant turn; it gets a blank one.
        blank_answers: the last answer of a sample with a label may be blank.

    Samples that share a task_id and differ otherwise are numbered in the order of the files: ``id``, ``id#2``, ...

    Raises:
        UserError: as ``conversation_files``.
    """
    reading = Reading()
    files = conversation_files(paths)
    named = ", ".join(map(str, [paths] if isinstance(paths, (str, Path)) else paths))
    if format not in ("auto", *FORMATS):
        what = f"{show(format)} is not known; use auto, {', '.join(FORMATS)}"
        reading.problems.append(Problem(named, "format", what))
        return reading
    checker = Checker(format, modalities, check_files, questions, blank_answers)
    first: dict[bytes, tuple[Path, str]] = {}
    used: Counter[str] = Counter()
    noted: dict[str, list[str]] = {}
    for file in files:
        rewrite = PathRewriter(Path(root).expanduser() if root else file.parent, path_map)
        for where, entry in _placed_entries(file):
            if entry.fault:
                reading.problems.append(Problem(where, "", entry.fault, entry.raw))
                continue
            conversation, found = checker.check(entry.raw, rewrite)
            if conversation is not None:
                content = hashlib.sha256(json.dumps(entry.raw, sort_keys=True).encode()).digest()
                other, place = first.setdefault(content, (file, where))
                if place != where:
                    remedy = "leave one out" if other == file else "the same samples are in two files; name one"
                    found = [("sample", f"is the same as the one at {place}; {remedy}")]
            reading.problems += [Problem(where, name, what, entry.raw) for name, what in found]
            if conversation is None or found:
                continue
            name = conversation.task_id
            while name in reading.places:
                used[conversation.task_id] += 1
                name = f"{conversation.task_id}#{used[conversation.task_id] + 1}"
            if name != conversation.task_id:
                conversation = conversation.model_copy(update={"task_id": name})
                noted.setdefault(REPEATED, []).append(where)
            reading.places[name] = where
            reading.conversations.append(conversation)
            for what in peculiarities(conversation):
                noted.setdefault(what, []).append(where)
    for what, places in noted.items():
        samples = "1 sample" if len(places) == 1 else f"{len(places)} samples"
        reading.notices.append(f"{places[0]}: {what} ({samples})")
    if not reading.conversations and not reading.problems:
        reading.problems.append(Problem(named, "", "holds no conversation; name files that have some"))
    return reading


def _placed_entries(file: Path) -> Iterator[tuple[str, Entry]]:
    """Every sample of a file with its place, "file:line"."""
    last_line = None
    for number, entry in enumerate(entries(file), start=1):
        where = str(file) if entry.line is None else f"{file}:{entry.line}"
        if last_line is not None and entry.line == last_line:
            where += f" (sample {number})"
        last_line = entry.line
        yield where, entry
