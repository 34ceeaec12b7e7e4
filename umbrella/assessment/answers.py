"""The file that a cohort's answers gather in, line by line, and what keeps it from holding answers of two kinds."""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from umbrella.base import UserError
from umbrella.evaluation.predictions import Prediction
from umbrella.fileio import LocksUnavailable, lock, write_atomic


class AnswerFile:
    """JSON Lines of predictions, which a second run goes on with.

    Beside it, ``<name>.about.json`` says what was asked and of whom. A file without that is nobody's to go on with.

    Args:
        path: of the file; it need not be there yet.
        about: name to value of all that decides what an answer is, as JSON has it. A value with a "content" is the same
            as another one with that content; the rest of it tells people which it is.

    Raises:
        UserError: it was begun with something else; it is not such a file.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.about = json.loads(json.dumps(about))
        self.beside = path.with_name(f"{path.name}.about.json")
        if path.is_dir():
            raise UserError(f"output={path}: is a folder; name a file, {path / 'predictions.jsonl'} say")
        begun = path.exists() and path.stat().st_size > 0
        if begun and self.beside.exists():
            self._check_same()
        elif begun:
            raise UserError(f"output={path}: is there already, and {self.beside.name} is not; give another output")

    def answered(self, known: Collection[str]) -> set[str]:
        """The task_ids that it has whole lines of. What a killed process has left of a line is passed over.

        Raises:
            UserError: a line that is no prediction, or of a task_id that is not ``known``, or is there twice.
        """
        found: set[str] = set()
        if not self.path.exists():
            return found
        remedy = "delete that line, or give another output"
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    task_id = Prediction.from_json(line.decode()).task_id
                except (ValueError, TypeError, KeyError, AttributeError):
                    raise UserError(f"{self.path}:{number}: is no prediction; {remedy}") from None
                if task_id in found or task_id not in known:
                    what = "is there twice" if task_id in found else "is not in data.input"
                    raise UserError(f"{self.path}:{number}: {task_id} {what}; {remedy}")
                found.add(task_id)
        return found

    @contextmanager
    def opened(self) -> Iterator["Appender"]:
        """To write to it, which one process at a time can. What is left of half a line is cut off.

        Raises:
            UserError: another process writes to it.
        """
        with self.path.open("ab") as file:
            with suppress(LocksUnavailable):  # an answer that is there twice is found
                if not lock(file):
                    raise UserError(f"output={self.path}: another process is writing to it")
            write_atomic(self.beside, json.dumps(self.about, indent=1))
            os.truncate(self.path, _whole_lines(self.path))
            yield Appender(file)

    def _check_same(self) -> None:
        try:
            then = json.loads(self.beside.read_text(encoding="utf-8"))
            differs = [name for name in {**then, **self.about} if _content(then, name) != _content(self.about, name)]
        except (ValueError, AttributeError):
            raise UserError(f"{self.beside}: cannot be read; give another output") from None
        if differs:
            name = differs[0]
            was, now = _in_words(then, name), _in_words(self.about, name)
            what = f"{name} was {was} and is {now}" if was != now else f"{name}={now} has changed since"
            raise UserError(f"output={self.path}: was begun with something else: {what}; give another output")


class Appender:
    """An open file of answers."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, predictions: Iterable[Prediction]) -> None:
        """Add lines; they survive a power cut when this returns."""
        self._file.write("".join(f"{prediction.to_json()}\n" for prediction in predictions).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def key_of(about: Mapping[str, Any]) -> str:
    """Names what ``AnswerFile`` is told: the same for the same, and for other places of it."""
    contents = {name: _content(about, name) for name in about}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:8]


def _whole_lines(path: Path) -> int:
    """Bytes up to the last end of a line."""
    with path.open("rb") as file:
        return sum(len(line) for line in file if line.endswith(b"\n"))


def _content(about: Mapping[str, Any], name: str) -> Any:
    value = about.get(name)
    return value.get("content", value) if isinstance(value, dict) else value


def _in_words(about: Mapping[str, Any], name: str) -> str:
    value = about.get(name)
    return str(value.get("name", value) if isinstance(value, dict) else value)
