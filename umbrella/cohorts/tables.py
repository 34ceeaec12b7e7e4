"""Phenotype tables: which column holds a variable, and which value each of its texts means."""

import csv
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from umbrella.base import UserError, format_value

MISSING = {"", "n/a", "na", "nan", "none", "null", "-", ".", "?", "unknown", "missing", "not reported"}
RANGE = re.compile(r"[<>≤≥]=?\s*\d[\d.]*|\d[\d.]*\s*(-|–|to)\s*\d[\d.]*|\d[\d.]*\s*\+")
SEX = {
    **dict.fromkeys(("m", "male", "man", "boy", "1"), "male"),
    **dict.fromkeys(("f", "female", "w", "woman", "girl", "2"), "female"),
}
"""Codes of sex that are understood without a description. Numbers only where no other number occurs."""
COLUMNS = {
    "participant_id": (
        *("participant_id", "subject_id", "subject", "sub", "participant"),
        *("src_subject_id", "subjectkey", "subj_id", "subj", "eid", "id"),
    ),
    "session_id": ("session_id", "session", "ses", "visit", "timepoint", "eventname"),
    "sex": ("sex", "gender"),
    "age": ("age", "age_.*"),
    "site": ("site", "site_id", "site_name", "scanner", "scanner_id", "center", "centre"),
    "family_id": ("family_id", "family", "fam_id", "family.*"),
    "diagnosis": ("diagnosis", "dx", "group"),
}
"""Variable to patterns of the columns that are guessed, the preferred one first."""
NUMBERS, CLASSES = ("age",), ("sex", "diagnosis", "site", "family_id")
"""Variables that are always numbers, and always classes. Others are numbers if 9 of 10 of their texts are."""
MAX_AGE = 125
SEVERAL = "\0several"
"""The text of a cell for which a table has several rows that differ."""
SHOWN = 12


def normalise(name: str) -> str:
    """Return a column name in lower case with underscores: "Age (years)" becomes "age_years"."""
    return re.sub(r"\W+", "_", name.strip().casefold()).strip("_")


def canonical(name: str) -> str:
    """Return the name of a variable for what a user writes: "Gender" becomes "sex"."""
    return {"gender": "sex"}.get(normalise(name), normalise(name))


def subject_key(name: str) -> str:
    """Return what identifies a subject in tables and file names: the name without "sub-"."""
    return name.strip().removeprefix("sub-")


def read_rows(file: Path) -> Iterator[dict[str, str]]:
    """Yield the header, as a row of empty texts, and the rows of a table, by normalised column names.

    Columns are separated by tabs, commas or semicolons.

    Raises:
        UserError: the file cannot be read or holds no table.
    """
    try:
        text = _decode_text(file.read_bytes())
        first = text.partition("\n")[0]
        reader = csv.reader(StringIO(text, newline=""), delimiter=next((m for m in "\t,;" if m in first), "\t"))
        header = [normalise(name) for name in next(reader, [])]
        if not any(header):
            raise UserError(f"{file}: is empty; the first line must name the columns")
        yield dict.fromkeys(header, "")
        for row in filter(any, reader):
            yield dict.fromkeys(header, "") | dict(zip(header, map(str.strip, row), strict=False))
    except (OSError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as a table: {getattr(error, 'strerror', None) or error}") from None


def _decode_text(data: bytes) -> str:
    """Decode UTF-8 with or without a mark, and what spreadsheets write besides: UTF-16 with a mark, and Latin-1."""
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


@dataclass
class Table:
    """A table, or all ``*_sessions.tsv`` of a dataset as one."""

    name: str
    header: list[str]
    rows: Iterable[dict[str, str]]
    """Read once, by ``load``."""
    levels: Mapping[str, dict[str, str]] = field(default_factory=dict)
    """Column to code to text, from the JSON file beside the table."""
    cells: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    """(subject key, session) to column to text, of the columns in use."""
    sessions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Subject key to its sessions in this table."""

    @classmethod
    def open(cls, file: Path) -> "Table":
        """Open a table and read its header and the JSON file beside it. Raises UserError if this is not possible."""
        rows = read_rows(file)
        return cls(file.name, list(next(rows)), rows, _read_levels(file.with_suffix(".json")))

    @classmethod
    def of_sessions(cls, files: Sequence[Path]) -> "Table":
        """Combine the ``sub-*_sessions.tsv`` of the subjects' folders."""
        rows = [{"participant_id": f.name.split("_")[0]} | row for f in files for row in list(read_rows(f))[1:]]
        return cls("*_sessions.tsv", list(dict.fromkeys(name for row in rows for name in row)), rows)

    def load(self, columns: Mapping[str, str], wanted: Iterable[str]) -> None:
        """Read the cells of the wanted columns. ``columns``: variable to column, from the user."""
        subject, session = (pick_column(self, name, columns) for name in ("participant_id", "session_id"))
        if not subject:
            names = ", ".join(self.header[:SHOWN])
            raise UserError(f"{self.name}: no column of subjects in {names}; --columns participant_id=NAME")
        names_ = sorted(set(wanted))
        for row in self.rows:
            key = (subject_key(row[subject]), row.get(session or "", "").removeprefix("ses-"))
            new, old = {name: row.get(name, "") for name in names_}, self.cells.get(key)
            if old is None:
                self.sessions[key[0]].append(key[1])
            self.cells[key] = {name: SEVERAL if old and old[name] != text else text for name, text in new.items()}

    def cell(self, subject: str, session: str, column: str) -> str | None:
        """Return a text of a subject and session, or None if the table has no row of them.

        For a scan without a session, the rows of several sessions must agree.
        """
        row = self.cells.get((subject, session)) or self.cells.get((subject, ""))
        if row is not None:
            return row[column]
        texts = set() if session else {self.cells[subject, one][column] for one in self.sessions.get(subject, ())}
        return (texts.pop() if len(texts) == 1 else SEVERAL) if texts else None


def _read_levels(file: Path) -> dict[str, dict[str, str]]:
    """Read the ``Levels`` of a sidecar: column to code to text. A level is a text or {Description: ...}."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not JSON: {error}; correct it, or rename it") from None
    found = {}
    for column, entry in raw.items() if isinstance(raw, dict) else ():
        levels = entry.get("Levels") if isinstance(entry, dict) else None
        if isinstance(levels, dict):
            texts = {c: t.get("Description", c) if isinstance(t, dict) else t for c, t in levels.items()}
            found[normalise(column)] = {_code(code): str(text).strip() for code, text in texts.items()}
    return found


def pick_column(table: Table, variable: str, columns: Mapping[str, str]) -> str | None:
    """Return the column of a variable in one table: the one that the user names, its own name, or a guess.

    Columns of subjects and sessions are guessed in tables that lack the named one, too.

    Raises:
        UserError: several columns fit equally.
    """
    if (name := normalise(columns.get(variable, ""))) in table.header:
        return name
    if name and variable not in ("participant_id", "session_id"):
        return None
    for pattern in (re.escape(variable), *COLUMNS.get(variable, ())):
        fitting = [name for name in table.header if re.fullmatch(pattern, name)]
        if len(fitting) > 1:
            names = ", ".join(fitting)
            raise UserError(f"{table.name}: {variable} may be {names}; --columns {variable}={fitting[0]} decides")
        if fitting:
            return fitting[0]
    return None


class Variable:
    """A variable of subjects: its columns, and the value of each text in them."""

    def __init__(self, name: str, sources: Sequence[tuple[Table, str]], given: Mapping[str, str]) -> None:
        """Decide whether the values are numbers or classes, and which text means which value.

        Args:
            name: of the variable, such as "sex".
            sources: (table, column), the table that wins first.
            given: code to value, from the user; they win over ``Levels``. The value may be "n/a".
        """
        self.name, self.sources = name, sources
        self._levels: dict[str, str] = {}
        for table, column in reversed(sources):
            self._levels |= table.levels.get(column, {})
        self._described = bool(self._levels)
        self._levels |= {_code(code): text for code, text in given.items()}
        texts = Counter(row[column] for table, column in sources for row in table.cells.values())
        readable = [text for text in texts if not (_is_missing(text) or RANGE.fullmatch(text) or text == SEVERAL)]
        numbers = [text for text in readable if _number(text) is not None]
        self.is_number = name in NUMBERS or (
            name not in CLASSES
            and all(map(_is_missing, self._levels.values()))
            and 0 < 0.9 * len(readable) <= len(numbers)
        )
        self._sex = SEX if set(map(_code, numbers)) <= {"1", "2"} else {c: s for c, s in SEX.items() if c.isalpha()}
        self._spellings: dict[str, str] = {}
        for text, _ in texts.most_common():  # of spellings that differ by case, the most frequent
            self._spellings.setdefault(_code(text), " ".join(text.split()))
        self.decoded = {text: self._decode(text) for text in texts}
        """Text to (value or None, reason why there is none)."""

    def value(self, subject: str, session: str) -> tuple[Any, str]:
        """Return the value of a subject in a session, or None and the reason why there is none."""
        for table, column in self.sources:
            if (text := table.cell(subject, session, column)) is not None:
                return self.decoded.get(text) or self._decode(text)
        return None, "no row in the tables"

    def _decode(self, text: str) -> tuple[Any, str]:
        code = _code(text)
        value = self._levels.get(code)
        if text == SEVERAL:
            return None, "several rows that differ"
        if _is_missing(text) or (value is not None and _is_missing(value)):
            return None, "n/a"
        number = _number(text)
        if self.is_number:
            if number is None:
                return None, "a range" if RANGE.fullmatch(text) else f"not a number: {format_value(text)}"
            if self.name == "age" and not 0 <= number <= MAX_AGE:
                return None, f"not an age in years: {format_value(text)}"
            return number, ""
        if self.name == "sex":
            word = re.search(r"\b(female|woman|male|man)\b", (value or "").casefold())
            value = SEX[word[1]] if word else value or self._sex.get(code)
        if value is None and (self.name == "sex" or self._described or (self._levels and number is not None)):
            return None, f"unknown code {format_value(text)}"
        return value or self._spellings[code], ""

    @property
    def description(self) -> str:
        """The columns, and what texts mean: "sex: column gender of participants.tsv; m = male"."""
        columns = " and ".join(f"column {column} of {table.name}" for table, column in self.sources)
        pairs = [f"{text} = {value}" for text, (value, _) in sorted(self.decoded.items()) if value not in (None, text)]
        shown = ", ".join(pairs[:SHOWN]) + ", ..." * (len(pairs) > SHOWN)
        return f"{self.name}: {columns}" + (f"; {shown}" if pairs and not self.is_number else "")


def _code(text: str) -> str:
    return re.sub(r"\.0+$", "", " ".join(text.split())).casefold()


def _is_missing(text: str) -> bool:
    return text.strip().casefold() in MISSING


def _number(text: str) -> int | float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number) or "_" in text:
        return None
    return int(number) if number.is_integer() else number
