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
from functools import cache, partial
from pathlib import Path
from typing import Any

from umbrella.base import UserError, format_name, format_value, pluralise
from umbrella.conversations.formats import SampleError, absolute_path, path_error
from umbrella.conversations.schema import Conversation
from umbrella.conversations.validation import parse_sample, unusual_features
from umbrella.fileio import dataset_hint

EXTENSIONS = tuple(f".{name}{gz}" for name in ("json", "jsonl", "ndjson") for gz in ("", ".gz"))
NAMES = f"name files that end with {', '.join(EXTENSIONS)}"


@dataclass(frozen=True)
class Problem:
    """One problem of a conversation file, shown as one line."""

    where: str
    """"file:line", or "file"; samples after the first of a line have their number, "file:1 (sample 2)"."""
    field: str
    """Field with the problem, or ""."""
    message: str
    """With the remedy."""
    sample: Any = None
    """Raw object or text line if only this sample is bad; None if the problem concerns the file."""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.field, self.message) if part)


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
        if hint := dataset_hint(path):
            problems.append(hint)
            continue
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
    first: dict[bytes, tuple[Path, str]] = {}
    used: Counter[str] = Counter()
    noted: dict[str, list[str]] = {}

    @cache  # samples share volumes, and asking a network drive takes milliseconds
    def find_volume(path: str, base: Path) -> tuple[str, str]:
        absolute = absolute_path(path, base, path_map)
        return absolute, path_error(absolute, check_files)

    for file in conversation_files(paths):
        base = Path(root).expanduser() if root else file.parent
        for where, raw, unreadable in _read_samples(file):
            found = [("", unreadable)] if unreadable else []
            try:
                if not found:
                    content = json.dumps(raw, sort_keys=True, ensure_ascii=False).encode()
                    find = partial(find_volume, base=base)
                    conversation = parse_sample(raw, find, format, modalities, allow_unanswered, allow_blank_answers)
                    conversation.model_dump_json()
                    other, place = first.setdefault(hashlib.sha256(content).digest(), (file, where))
                    if place != where:
                        remedy = "leave one out" if other == file else "the same samples are in two files; name one"
                        found = [("sample", f"is the same as the one at {place}; {remedy}")]
            except SampleError as error:
                found = error.problems
            except UnicodeEncodeError as error:
                text = format_value(error.object[max(0, error.start - 30) : error.end + 30])
                found = [("sample", f"{text} is not Unicode text: half of a character is missing; write it anew")]
            except (ValueError, RecursionError):  # of the serialisation
                found = [("sample", "is nested too deep; flatten it")]
            if found:
                reading.problems += [Problem(where, name, message, raw) for name, message in found]
                continue
            name = conversation.task_id
            while name in reading.locations:
                used[conversation.task_id] += 1
                name = f"{conversation.task_id}#{used[conversation.task_id] + 1}"
            if name != conversation.task_id:
                conversation = conversation.model_copy(update={"task_id": name})
                notice = "the task_id is used before with other content; such samples are numbered: id, id#2, ..."
                noted.setdefault(notice, []).append(where)
            reading.locations[name] = where
            reading.conversations.append(conversation)
            for notice in unusual_features(conversation):
                noted.setdefault(notice, []).append(where)
    for notice, locations in noted.items():
        reading.notices.append(f"{locations[0]}: {notice} ({pluralise(len(locations), 'sample')})")
    if not reading.conversations and not reading.problems:
        named = ", ".join(map(str, [paths] if isinstance(paths, (str, Path)) else paths))
        reading.problems.append(Problem(named, "", "holds no conversation; name files that have some"))
    return reading


def _read_samples(file: Path) -> Iterator[tuple[str, Any, str]]:
    """Yield ("file:line", raw sample, error or "") for every sample of a file.

    In JSON Lines an error concerns one line, otherwise the rest of the file; the raw sample is then None.
    """
    last_line = None
    try:
        data = gzip.decompress(file.read_bytes()) if file.name.lower().endswith(".gz") else file.read_bytes()
        for number, (line, raw, error) in enumerate(_parse(file, data.decode("utf-8-sig")), start=1):
            yield f"{file}:{line}" + (f" (sample {number})" if line == last_line else ""), raw, error
            last_line = line
    except UnicodeDecodeError as error:
        yield str(file), None, f"is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8"
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield str(file), None, f"cannot be unpacked: {error}; copy or compress it again"
    except OSError as error:
        yield str(file), None, f"cannot be read: {error.strerror}; check the file and its permissions"
    except UserError as error:
        yield str(file), None, str(error)


def _parse(file: Path, text: str) -> Iterator[tuple[int, Any, str]]:
    """Yield (first line, raw sample, error or ""). The text is a list, objects in a row, or an object per line.

    Raises:
        UserError: the whole text is in doubt.
    """
    # splitlines would also split at U+2028 and other characters that may occur in a text.
    lines = text.split("\n")
    first, second = [*(line.strip() for line in lines if line.strip()), "", ""][:2]
    if not first:
        raise UserError("is empty; write a conversation into it or leave it out")
    if first.startswith("[") and not text.rstrip().endswith("]"):
        raise UserError("not JSON: the list is not closed, so the file is probably cut short; copy it again")
    is_list = first.startswith("[")
    named_lines = any(end in file.name.lower() for end in (".jsonl", ".ndjson"))
    by_line = not is_list and first != "{" and (named_lines or second.startswith("{"))
    separators = " \t\r\n,[]" if is_list else " \t\r\n"
    decoder = json.JSONDecoder(object_pairs_hook=_to_dict)
    parts = enumerate(map(str.strip, lines), start=1) if by_line else [(1, text)]
    for line, part in parts:
        position = 0
        while True:
            start = position
            while position < len(part) and part[position] in separators:
                position += 1
            line += part.count("\n", start, position)
            if position == len(part):
                break
            try:
                raw, end = decoder.raw_decode(part, position)
            except (UserError, ValueError, RecursionError) as error:
                message = str(error)
                if isinstance(error, json.JSONDecodeError):
                    line += part.count("\n", position, error.pos)
                    message = f"not JSON: {error.msg}, column {error.colno}; correct the text there"
                elif isinstance(error, ValueError):  # Python limits the digits of an integer
                    message = "holds a number of too many digits; shorten it"
                elif isinstance(error, RecursionError):
                    message = "is nested too deep to be read; flatten it"
                yield line, part if by_line else None, message
                break
            yield line, raw, ""
            line += part.count("\n", position, end)
            position = end


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UserError(f"holds the key {format_value(twice)} twice in one object; keep one of them")
    return made
