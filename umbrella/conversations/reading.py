"""Reading of conversation files: usable conversations, and the problems of the others."""

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

from umbrella.base import UserError, pluralise
from umbrella.conversations.formats import FORMATS
from umbrella.conversations.schema import Conversation
from umbrella.conversations.validation import PathRewriter, SampleChecker, unusual_features
from umbrella.conversations.value_checks import format_name, format_value

MAX_CHARACTERS = 1_000_000
"""Maximum number of characters of JSON in a sample: about 250,000 tokens, more than a model accepts."""
MAX_RATIO = 300
"""Maximum ratio of unpacked to packed size. Repetitive conversations reach 200; gzip reaches 1,000."""
MIN_UNPACKED = 2**26
"""Unpacked size in bytes up to which the ratio is not limited."""
EXTENSIONS = tuple(f".{name}{gz}" for name in ("json", "jsonl", "ndjson") for gz in ("", ".gz"))
NAMES = f"name files that end with {', '.join(EXTENSIONS)}"
REPEATED = "the task_id is used before with other content; such samples are numbered: id, id#2, ..."


@dataclass(frozen=True)
class RawSample:
    """One sample of a file before validation, or the error that prevented reading it."""

    line: int | None
    """First line, counted from 1; None for errors of the whole file."""
    raw: Any
    """The object; the text line if it is not JSON; None if the rest of the file cannot be read."""
    error: str = ""
    """Error message with the remedy; "" if there is no error."""


@dataclass(frozen=True)
class Problem:
    """One problem of a conversation file, shown as one line."""

    where: str
    """"file:line", or "file"; samples after the first of a line have their number, "file:1 (sample 2)"."""
    field: str
    """Field with the problem, or ""."""
    what: str
    """Message with the remedy."""
    sample: Any = None
    """Raw object or text line if only this sample is bad; None if the problem concerns the file."""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.field, self.what) if part)


@dataclass
class Reading:
    """Conversations without problems, and all problems of the others."""

    conversations: list[Conversation] = field(default_factory=list)
    locations: dict[str, str] = field(default_factory=dict)
    """task_id to "file:line"."""
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    """Notices about unusual but valid samples, one line each."""


def conversation_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the conversation files of paths: files, folders (recursive) and glob patterns (``**`` is recursive).

    The result is sorted and has each file once. Hidden files and folders are skipped.

    Raises:
        UserError: a path gives no file; one line for each such path.
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
            problems.append(f"{format_name(path)}: {nothing}")
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
    """Read all conversations of some files. Problems are collected, not raised. Volume paths become absolute.

    Args:
        paths: see ``conversation_files``.
        root: base of relative volume paths; the folder of the conversation file if None.
        path_map: old to new prefix of volume paths, in whole path components. The longest match is used, before
            ``root``.
        format: format of all samples, one of ``FORMATS``, or "auto" to detect it for each sample.
        modalities: accepted modality names; None accepts all.
        check_files: check that each volume file exists.
        allow_unanswered: a sample may end with a user turn, to which a blank assistant turn is added, or with a blank
            assistant turn.
        allow_blank_answers: the last answer of a sample with a label may be blank.

    Samples that share a task_id and differ otherwise are numbered in the order of the files: ``id``, ``id#2``, ...

    Raises:
        UserError: see ``conversation_files``.
    """
    reading = Reading()
    files = conversation_files(paths)
    named = ", ".join(map(str, [paths] if isinstance(paths, (str, Path)) else paths))
    if format not in ("auto", *FORMATS):
        what = f"{format_value(format)} is not known; use auto, {', '.join(FORMATS)}"
        reading.problems.append(Problem(named, "format", what))
        return reading
    checker = SampleChecker(format, modalities, check_files, allow_unanswered, allow_blank_answers)
    first: dict[bytes, tuple[Path, str]] = {}
    used: Counter[str] = Counter()
    noted: dict[str, list[str]] = {}
    for file in files:
        rewrite = PathRewriter(Path(root).expanduser() if root else file.parent, path_map)
        for where, sample in _read_samples(file):
            if sample.error:
                reading.problems.append(Problem(where, "", sample.error, sample.raw))
                continue
            conversation, found = checker.check(sample.raw, rewrite)
            if conversation is not None:
                content = hashlib.sha256(json.dumps(sample.raw, sort_keys=True).encode()).digest()
                other, place = first.setdefault(content, (file, where))
                if place != where:
                    remedy = "leave one out" if other == file else "the same samples are in two files; name one"
                    found = [("sample", f"is the same as the one at {place}; {remedy}")]
            reading.problems += [Problem(where, name, what, sample.raw) for name, what in found]
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
            for what in unusual_features(conversation):
                noted.setdefault(what, []).append(where)
    for what, locations in noted.items():
        reading.notices.append(f"{locations[0]}: {what} ({pluralise(len(locations), 'sample')})")
    if not reading.conversations and not reading.problems:
        reading.problems.append(Problem(named, "", "holds no conversation; name files that have some"))
    return reading


def _read_samples(file: Path) -> Iterator[tuple[str, RawSample]]:
    """Yield every sample of a file with its location, "file:line"."""
    last_line = None
    for number, sample in enumerate(parse_samples(file), start=1):
        where = str(file) if sample.line is None else f"{file}:{sample.line}"
        if last_line is not None and sample.line == last_line:
            where += f" (sample {number})"
        last_line = sample.line
        yield where, sample


def parse_samples(file: Path) -> Iterator[RawSample]:
    """Yield every sample of a file. In JSON Lines an error concerns one line, otherwise the rest of the file."""
    try:
        packed = file.name.lower().endswith(".gz")
        if packed and _exceeds_ratio(file):
            what = f"unpacks to more than {MAX_RATIO} times its size, which conversations do not; is it the right file?"
            yield RawSample(None, None, f"{what} if so, unpack it")
            return
        text = (gzip.decompress(file.read_bytes()) if packed else file.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield RawSample(None, None, f"is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield RawSample(None, None, f"cannot be unpacked: {error}; copy or compress it again")
    except OSError as error:
        yield RawSample(None, None, f"cannot be read: {error.strerror}; check the file and its permissions")
    else:
        # splitlines would also split at U+2028 and other characters that may occur in a text.
        lines = text.split("\n")
        first, second = [*(line.strip() for line in lines if line.strip()), "", ""][:2]
        named_lines = any(end in file.name.lower() for end in (".jsonl", ".ndjson"))
        if not first:
            yield RawSample(None, None, "is empty; write a conversation into it or leave it out")
        elif first.startswith("[") and not text.rstrip().endswith("]"):
            yield RawSample(
                None, None, "not JSON: the list is not closed, so the file is probably cut short; copy it again"
            )
        elif first not in ("[", "{") and (second.startswith("{") or (named_lines and not first.startswith("["))):
            yield from _parse_lines(lines)
        else:
            yield from _parse_stream(text)


def _exceeds_ratio(file: Path) -> bool:
    # A separate pass that keeps nothing, so that a refused file does not fill the memory.
    most, size = max(MIN_UNPACKED, MAX_RATIO * file.stat().st_size), 0
    with gzip.open(file) as unpacked:
        while size <= most and (part := unpacked.read(2**20)):
            size += len(part)
    return size > most


def _too_long(line: int, text: str, start: int, end: int) -> RawSample | None:
    if end - start <= MAX_CHARACTERS:
        return None
    what = f"has {end - start} characters, and a sample may have {MAX_CHARACTERS}; shorten it, or split it into several"
    return RawSample(line, text[start : start + 1000], what)


def _parse_lines(lines: list[str]) -> Iterator[RawSample]:
    reader = _JsonReader()
    for number, line in enumerate(lines, start=1):
        if long := _too_long(number, line, 0, len(line)):
            yield long
        elif line.strip():
            raw, end, error = reader.read(line, len(line) - len(line.lstrip()))
            if not error and line[end:].strip():
                error = f"not JSON: more text after the object, column {end + 1}; write one object per line"
            yield RawSample(number, line.rstrip("\r") if error else raw, error)


def _parse_stream(text: str) -> Iterator[RawSample]:
    """Yield the objects of a list, or one object, or several concatenated objects."""
    reader = _JsonReader()
    separators = " \t\r\n,[]" if text.lstrip().startswith("[") else " \t\r\n"
    position = line = 0
    while True:
        start = position
        while position < len(text) and text[position] in separators:
            position += 1
        line += text.count("\n", start, position)
        if position == len(text):
            return
        raw, end, error = reader.read(text, position)
        if error and end == position:
            yield RawSample(reader.line or line + 1, None, error)
            return
        yield _too_long(line + 1, text, position, end) or RawSample(line + 1, raw, error)
        line += text.count("\n", position, end)
        position = end


class _JsonReader:
    """Reads one JSON value at a time; errors are returned, not raised."""

    def __init__(self) -> None:
        self.line = 0
        """Line of the last error within the text; 0 if unknown."""
        self._errors: list[str] = []
        self._decoder = json.JSONDecoder(
            parse_constant=self._constant, parse_int=self._integer, object_pairs_hook=self._object
        )

    def read(self, text: str, position: int) -> tuple[Any, int, str]:
        """Return (value, end position, error); the end equals ``position`` if the value cannot be read."""
        self.line = 0
        self._errors.clear()
        try:
            raw, end = self._decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            self.line = error.lineno
            return None, position, f"not JSON: {error.msg}, column {error.colno}; correct the text there"
        except RecursionError:
            return None, position, "is nested too deep to be read; flatten it"
        return raw, end, self._errors[0] if self._errors else ""

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            self._errors.append(f"holds the key {format_value(twice)} twice in one object; keep one of them")
        return made

    def _constant(self, name: str) -> float:
        self._errors.append(f"holds {name}, which is not JSON; write null or a number")
        return float(name)

    def _integer(self, digits: str) -> int | str:
        try:
            return int(digits)
        except ValueError:  # Python limits the number of digits
            self._errors.append(f"holds a number of {len(digits)} digits; shorten the number")
            return digits
