"""Phenotype tables: which column holds a variable, and which value each of its texts means."""

import csv
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umbrella.base import UserError, format_value

MISSING = {"", "n/a", "na", "nan", "none", "null", "-", ".", "?", "unknown", "missing", "not reported"}
RANGE = re.compile(r"[<>≤≥]=?\s*\d[\d.]*|\d[\d.]*\s*(-|–|to)\s*\d[\d.]*|\d[\d.]*\s*\+")
SEX = {
    **dict.fromkeys(("m", "male", "man", "boy", "1"), "male"),
    **dict.fromkeys(("f", "female", "w", "woman", "girl", "2"), "female"),
}
"""Codes of sex that are understood without a description."""
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
"""Variable to the column names that are guessed, in lower case, the preferred one first."""
NUMBERS, CLASSES = ("age",), ("sex", "diagnosis", "site", "family_id")
"""Variables that are always numbers, and always classes. Others are numbers if 9 of 10 texts are."""
MAX_AGE = 125
SEVERAL = "\0several"
"""The text of a cell for which a table has several rows that differ."""


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
    """Yield the rows of a table with commas, tabs or semicolons, by normalised column names.

    Raises:
        UserError: the file cannot be read or holds no table.
    """
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            separator = next((mark for mark in "\t,;" if mark in first), "\t")
            reader = csv.reader(stream, delimiter=separator)
            header = [normalise(name) for name in next(reader, [])]
            if not any(header):
                raise UserError(f"{file}: is empty; the first line names the columns")
            for row in reader:
                if any(row):
                    yield dict(zip(header, [*map(str.strip, row), *[""] * (len(header) - len(row))], strict=False))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise UserError(f"{file}: not a table: {error}") from None


@dataclass
class Table:
    """One table, or all ``*_sessions.tsv`` of a dataset as one."""

    name: str
    header: list[str]
    rows: Callable[[], Iterable[dict[str, str]]]
    levels: dict[str, dict[str, str]] = field(default_factory=dict)
    """Column to code to text, from the JSON file beside the table."""
    cells: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    """(subject key, session) to column to text, of the columns in use."""
    sessions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Subject key to its sessions in this table."""

    @classmethod
    def open(cls, file: Path) -> "Table":
        """Open a table and read its header and its JSON file. Raises UserError if it cannot be read."""
        with file.open(encoding="utf-8-sig", errors="surrogateescape") if file.is_file() else _missing(file) as stream:
            line = stream.readline()
        separator = next((mark for mark in "\t,;" if mark in line), "\t")
        header = [normalise(name) for name in next(csv.reader([line], delimiter=separator), [])]
        return cls(file.name, header, lambda: read_rows(file), _read_levels(file.with_suffix(".json")))

    @classmethod
    def of_sessions(cls, files: Sequence[Path]) -> "Table":
        """Combine the ``sub-*_sessions.tsv`` of the subjects' folders."""
        rows = [{"participant_id": file.name.split("_")[0], **row} for file in sorted(files) for row in read_rows(file)]
        return cls("*_sessions.tsv", list(dict.fromkeys(name for row in rows for name in row)), lambda: rows)

    def load(self, columns: Mapping[str, str], wanted: Iterable[str]) -> None:
        """Read the cells of the wanted columns. ``columns``: as given by the user, variable to column."""
        subject = pick_column(self, "participant_id", columns)
        session = pick_column(self, "session_id", columns)
        if not subject:
            names = ", ".join(self.header)
            raise UserError(f"{self.name}: no column of subjects in {names}; --columns participant_id=NAME gives it")
        names_ = sorted(set(wanted))
        for row in self.rows():
            key = (subject_key(row[subject]), row[session].removeprefix("ses-") if session else "")
            new = {name: row.get(name, "") for name in names_}
            old = self.cells.get(key)
            if old is None:
                self.cells[key] = new
                self.sessions[key[0]].append(key[1])
            else:
                self.cells[key] = {name: new[name] if new[name] == old[name] else SEVERAL for name in new}

    def cell(self, subject: str, session: str, column: str) -> str | None:
        """Return a text of a subject and session, or None if the table has no row of them.

        For a scan without a session, rows of several sessions must agree.
        """
        row = self.cells.get((subject, session)) or self.cells.get((subject, ""))
        if row is not None:
            return row[column]
        if session or subject not in self.sessions:
            return None
        texts = {self.cells[subject, one][column] for one in self.sessions[subject]}
        return texts.pop() if len(texts) == 1 else SEVERAL


def _missing(file: Path) -> Any:
    raise UserError(f"{file}: no such file; check the path of the table")


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
            found[normalise(column)] = {_code(str(code)): str(text).strip() for code, text in texts.items()}
    return found


def pick_column(table: Table, variable: str, columns: Mapping[str, str]) -> str | None:
    """Return the column of a variable in one table: the one that the user names, its own name, or a guess.

    Raises:
        UserError: several columns fit equally.
    """
    if variable in columns:
        return name if (name := normalise(columns[variable])) in table.header else None
    for pattern in (re.escape(normalise(variable)), *COLUMNS.get(variable, ())):
        if fitting := [name for name in dict.fromkeys(table.header) if re.fullmatch(pattern, name)]:
            if len(fitting) > 1:
                names = ", ".join(fitting)
                raise UserError(f"{table.name}: {variable} may be {names}; --columns {variable}={fitting[0]} decides")
            return fitting[0]
    return None


def _code(text: str) -> str:
    return re.sub(r"\.0+$", "", text.strip()).casefold()


class Variable:
    """A variable of subjects: its columns, and the value of each text in them."""

    def __init__(self, name: str, sources: Sequence[tuple[Table, str]], given: Mapping[str, str]) -> None:
        """Decide whether the values are numbers or classes, and which text means which value.

        Args:
            name: of the variable, such as "sex".
            sources: (table, column), the table that wins first.
            given: code to text, from the user; they win over ``Levels``.
        """
        self.name, self.sources = name, sources
        levels = {
            code: text for table, column in reversed(sources) for code, text in table.levels.get(column, {}).items()
        }
        self._levels = levels | {_code(code): text for code, text in given.items()}
        self.texts = Counter(row[column] for table, column in sources for row in table.cells.values())
        present = [text for text in self.texts if text != SEVERAL and text.casefold() not in MISSING]
        readable = [text for text in present if not RANGE.fullmatch(text)]
        numbers = sum(_number(text) is not None for text in readable)
        self.is_number = name in NUMBERS or (
            name not in CLASSES and not self._levels and bool(readable) and numbers >= 0.9 * len(readable)
        )
        spellings: dict[str, str] = {}
        for text, _ in self.texts.most_common():
            spellings.setdefault(" ".join(text.split()).casefold(), " ".join(text.split()))
        self._spellings = spellings
        self.decoded = {text: self._decode(text) for text in self.texts}
        """Text to (value or None, reason why there is none)."""

    def value(self, subject: str, session: str) -> tuple[Any, str]:
        """Return the value of a subject in a session, and "" or the reason why there is none (the value is None)."""
        for table, column in self.sources:
            if (text := table.cell(subject, session, column)) is not None:
                return self.decoded.get(text) or self._decode(text)
        return None, "no row in the tables"

    def _decode(self, text: str) -> tuple[Any, str]:
        if text == SEVERAL:
            return None, "several rows that differ"
        if text.casefold() in MISSING:
            return None, "n/a"
        if self.is_number:
            number = _number(text)
            if number is None:
                return None, "a range" if RANGE.fullmatch(text) else f"not a number: {format_value(text)}"
            if self.name == "age" and not 0 <= number <= MAX_AGE:
                return None, f"not an age in years: {format_value(text)}"
            return number, ""
        code, value = _code(text), self._levels.get(_code(text))
        if self.name == "sex":
            word = re.search(r"\b(female|woman|male|man)\b", (value or "").casefold())
            value = SEX[word[1]] if word else value or SEX.get(code)
        if value is None and (self._levels or self.name == "sex"):
            return None, f"unknown code {format_value(text)}"
        value = value or self._spellings[" ".join(text.split()).casefold()]
        return (None, "n/a") if value.casefold() in MISSING else (value, "")

    @property
    def description(self) -> str:
        """The columns, and the texts with other values: "sex: column gender of participants.tsv; m = male"."""
        columns = " and ".join(f"column {column} of {table.name}" for table, column in self.sources)
        pairs = [f"{text} = {value}" for text, (value, _) in sorted(self.decoded.items()) if value not in (None, text)]
        shown = ", ".join(pairs[:12]) + (f" and {len(pairs) - 12} more" if len(pairs) > 12 else "")
        return f"{self.name}: {columns}" + (f"; {shown}" if pairs and not self.is_number else "")


def _number(text: str) -> int | float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number) or "_" in text:
        return None
    return int(number) if number.is_integer() else number
