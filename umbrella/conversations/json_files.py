"""The JSON objects in a conversation file: one object, a list of them, or one per line (JSON Lines), also gzipped."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbrella.conversations.wording import show

MAX_CHARACTERS = 1_000_000
"""Characters of JSON that a sample may have: about 250,000 tokens, more than a model takes in."""
MAX_RATIO = 300
"""Size of an unpacked file over that of the packed one. Repetitive conversations reach 200; gzip itself, 1,000."""
MIN_UNPACKED = 2**26
"""Bytes up to which every packed file is read, whatever the ratio."""
EXTENSIONS = tuple(f".{name}{gz}" for name in ("json", "jsonl", "ndjson") for gz in ("", ".gz"))


@dataclass(frozen=True)
class Entry:
    """One sample of a file as it was read, or what stands in its way."""

    line: int | None
    """Where it starts, from 1; None for the file as a whole."""
    raw: Any
    """The object; the text line where that is not JSON; None where the file from here on cannot be read."""
    fault: str = ""
    """What is wrong with it; the remedy."""


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
