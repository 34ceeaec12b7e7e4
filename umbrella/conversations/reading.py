"""Conversation files to conversations, with every problem that there is beside those that can be used."""

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umbrella.base import UserError
from umbrella.conversations.fields import plain, show
from umbrella.conversations.formats import FORMATS
from umbrella.conversations.schema import Conversation
from umbrella.conversations.validation import Checker, PathRewriter, peculiarities

MAX_CHARACTERS = 1_000_000
"""Characters of JSON that a sample may have: about 250,000 tokens, more than a model takes in."""
MAX_RATIO = 300
"""Size of an unpacked file over that of the packed one. Repetitive conversations reach 200; gzip itself, 1,000."""
MIN_UNPACKED = 2**26
"""Bytes up to which every packed file is read, whatever the ratio."""
EXTENSIONS = tuple(f".{name}{gz}" for name in ("json", "jsonl", "ndjson") for gz in ("", ".gz"))
NAMES = f"name files that end with {', '.join(EXTENSIONS)}"
REPEATED = "the task_id is used before with other content; such samples are numbered: id, id#2, ..."


@dataclass(frozen=True)
class Entry:
    """One sample of a file as it was read, or what stands in its way."""

    line: int | None
    """Where it starts, from 1; None for the file as a whole."""
    raw: Any
    """The object; the text line where that is not JSON; None where the file from here on cannot be read."""
    fault: str = ""
    """What is wrong with it; the remedy."""


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
    locations: dict[str, str] = field(default_factory=dict)
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
    allow_unanswered: bool = False,
    allow_blank_answers: bool = False,
) -> Reading:
    """Read every conversation of some files; problems are collected, not raised. Volume paths become absolute.

    Args:
        paths: as in ``conversation_files``.
        root: what relative volume paths are relative to; the conversation file's own folder when None.
        path_map: old to new beginning of a volume path, in whole names; the longest that fits is used, before ``root``.
        format: that of every sample, one of ``FORMATS``, or "auto" to tell each by its keys.
        modalities: the modality names that the settings know; None accepts all.
        check_files: look whether each volume file exists.
        allow_unanswered: a sample may end with a user turn, to which a blank assistant turn is added, or with a blank
            assistant turn.
        allow_blank_answers: the last answer of a sample with a label may be blank.

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
    checker = Checker(format, modalities, check_files, allow_unanswered, allow_blank_answers)
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
            while name in reading.locations:
                used[conversation.task_id] += 1
                name = f"{conversation.task_id}#{used[conversation.task_id] + 1}"
            if name != conversation.task_id:
                conversation = conversation.model_copy(update={"task_id": name})
                noted.setdefault(REPEATED, []).append(where)
            reading.locations[name] = where
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


def entries(file: Path) -> Iterator[Entry]:
    """Every sample of a file in order. In JSON Lines a bad line is a fault of that line alone, else of the file."""
    try:
        packed = file.name.lower().endswith(".gz")
        if packed and _unpacks_too_far(file):
            what = f"unpacks to more than {MAX_RATIO} times its size, which conversations do not; is it the right file?"
            yield Entry(None, None, f"{what} if so, unpack it")
            return
        text = (gzip.decompress(file.read_bytes()) if packed else file.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Entry(None, None, f"is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield Entry(None, None, f"cannot be unpacked: {error}; copy or compress it again")
    except OSError as error:
        yield Entry(None, None, f"cannot be read: {error.strerror}; check the file and its permissions")
    else:
        # Not splitlines: a text in a sample may hold U+2028 and other breaks that end no line of the file.
        lines = text.split("\n")
        first, second = [*(line.strip() for line in lines if line.strip()), "", ""][:2]
        named_lines = any(end in file.name.lower() for end in (".jsonl", ".ndjson"))
        if not first:
            yield Entry(None, None, "is empty; write a conversation into it or leave it out")
        elif first.startswith("[") and not text.rstrip().endswith("]"):
            yield Entry(
                None, None, "not JSON: the list is not closed, so the file is probably cut short; copy it again"
            )
        elif first not in ("[", "{") and (second.startswith("{") or (named_lines and not first.startswith("["))):
            yield from _of_lines(lines)
        else:
            yield from _of_stream(text)


def _unpacks_too_far(file: Path) -> bool:
    # In a pass of its own, which keeps nothing: what is refused shall not fill the memory first.
    most, size = max(MIN_UNPACKED, MAX_RATIO * file.stat().st_size), 0
    with gzip.open(file) as unpacked:
        while size <= most and (part := unpacked.read(2**20)):
            size += len(part)
    return size > most


def _too_long(line: int, text: str, start: int, end: int) -> Entry | None:
    if end - start <= MAX_CHARACTERS:
        return None
    what = f"has {end - start} characters, and a sample may have {MAX_CHARACTERS}; shorten it, or split it into several"
    return Entry(line, text[start : start + 1000], what)


def _of_lines(lines: list[str]) -> Iterator[Entry]:
    reader = _Reader()
    for number, line in enumerate(lines, start=1):
        if long := _too_long(number, line, 0, len(line)):
            yield long
        elif line.strip():
            raw, end, fault = reader.read(line, len(line) - len(line.lstrip()))
            if not fault and line[end:].strip():
                fault = f"not JSON: more text after the object, column {end + 1}; write one object per line"
            yield Entry(number, line.rstrip("\r") if fault else raw, fault)


def _of_stream(text: str) -> Iterator[Entry]:
    """The objects of a list, or one object, or several one after another."""
    reader = _Reader()
    separators = " \t\r\n,[]" if text.lstrip().startswith("[") else " \t\r\n"
    position = line = 0
    while True:
        start = position
        while position < len(text) and text[position] in separators:
            position += 1
        line += text.count("\n", start, position)
        if position == len(text):
            return
        raw, end, fault = reader.read(text, position)
        if fault and end == position:
            yield Entry(reader.line or line + 1, None, fault)
            return
        yield _too_long(line + 1, text, position, end) or Entry(line + 1, raw, fault)
        line += text.count("\n", position, end)
        position = end


class _Reader:
    """Reads one JSON value at a time; what is wrong is told, not raised."""

    def __init__(self) -> None:
        self.line = 0
        """Of the last error, within the text; 0 where it is not known."""
        self._faults: list[str] = []
        self._decoder = json.JSONDecoder(
            parse_constant=self._constant, parse_int=self._integer, object_pairs_hook=self._object
        )

    def read(self, text: str, position: int) -> tuple[Any, int, str]:
        """(value, where it ends, what is wrong); it ends where it starts when it cannot be read at all."""
        self.line = 0
        self._faults.clear()
        try:
            raw, end = self._decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            self.line = error.lineno
            return None, position, f"not JSON: {error.msg}, column {error.colno}; correct the text there"
        except RecursionError:
            return None, position, "is nested too deep to be read; flatten it"
        return raw, end, self._faults[0] if self._faults else ""

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            self._faults.append(f"holds the key {show(twice)} twice in one object; keep one of them")
        return made

    def _constant(self, name: str) -> float:
        self._faults.append(f"holds {name}, which is not JSON; write null or a number")
        return float(name)

    def _integer(self, digits: str) -> int | str:
        try:
            return int(digits)
        except ValueError:  # Python reads no more than some thousand digits
            self._faults.append(f"holds a number of {len(digits)} digits; shorten the number")
            return digits
