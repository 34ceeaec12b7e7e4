"""Values that have the type they should have, and can still not be used: empty names, labels that are none."""

import json
import re
import reprlib
from collections.abc import Iterator
from math import isfinite
from typing import Any

from pydantic import ValidationError

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Characters that break a line, or worse, where a name is printed."""
LOSS_FLAGS = ("loss", "weight", "train")
"""Keys of a turn that say whether the training loss may supervise it: true or false, 1 or 0."""
HALF = re.compile("[\ud800-\udfff]")
"""Halves of a character, which JSON can write (``\\ud800``) and no Unicode text can hold."""

Finding = tuple[tuple[str | int, ...], str]
"""(location, what is wrong; the remedy)."""


def faulty_values(raw: Any) -> Iterator[Finding]:
    """What is wrong with the names and the label of a raw v2 sample; what is of another shape is passed over."""
    if not isinstance(raw, dict):
        return
    for key, remedy in (("task_id", "give every sample a name of its own"), ("task_type", "name the task, as in T1")):
        if isinstance(raw.get(key), str):
            yield from _faulty_name((key,), raw[key], remedy)
    people = raw.get("subject_ids")
    if isinstance(people, list):
        for i, person in enumerate(people):
            yield from _faulty_name(("subject_ids", i), person, "name a subject, or leave it out")
    elif people is not None:
        yield ("subject_ids",), f"must be a list, not {show(people)}"
    yield from _faulty_loss_flags(raw.get("conversations"))
    metadata = raw.get("metadata")
    for key in ("subject_id", "patient_id", "reference_id", "family_id"):
        if raw.get(key) is not None:
            yield from _faulty_name((key,), raw[key], "name the subject, or leave it out")
        if isinstance(metadata, dict) and metadata.get(key) is not None:
            yield from _faulty_name(("metadata", key), metadata[key], "name the subject, or leave it out")
    if isinstance(metadata, dict):
        label = metadata.get("subject_label")
        if not (label is None or isinstance(label, str) or _is_number(label)):
            yield ("metadata", "subject_label"), f"must be a text or a finite number, not {show(label)}"
        if isinstance(label, str) and not label.strip():
            yield ("metadata", "subject_label"), "is empty; write the label, or leave it out"
        key = "target" if metadata.get("target") is not None else "task"
        if not isinstance(metadata.get(key), str | None):
            yield ("metadata", key), f"must be a text, not {show(metadata[key])}"


def _faulty_loss_flags(turns: Any) -> Iterator[Finding]:
    for i, turn in enumerate(turns if isinstance(turns, (list, tuple)) else ()):
        flags = {key: turn[key] for key in LOSS_FLAGS if turn.get(key) is not None} if isinstance(turn, dict) else {}
        wrong = [(key, value) for key, value in flags.items() if not is_flag(value)]
        for key, value in wrong:
            yield ("conversations", i, key), f"must be true or false, or 1 or 0, not {show(value)}"
        if not wrong and len({bool(value) for value in flags.values()}) > 1:
            written = ", ".join(f"{key}: {show(value)}" for key, value in flags.items())
            yield ("conversations", i), f"its loss flags contradict each other ({written}); keep one of them"


def is_flag(value: Any) -> bool:
    """Whether the value says yes or no: true, false, 1 or 0."""
    return isinstance(value, bool | int | float) and value in (0, 1)


def _faulty_name(location: tuple[str | int, ...], name: Any, remedy: str) -> Iterator[Finding]:
    if not (isinstance(name, str) or _is_number(name)):
        yield location, f"must be a text or a number, not {show(name)}"
    elif not str(name).strip():
        yield location, f"is empty; {remedy}"
    elif CONTROL.search(str(name)):
        yield location, f"{show(name)} holds a line break or another control character; leave it out"


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    except OverflowError:  # an integer beyond what a float can hold
        return False


def half_characters(raw: Any) -> tuple[str, str] | None:
    """(field, what is wrong; the remedy) of the first text or key with half a character; None without one."""
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return _first_half(raw, "")
    return None


def _first_half(raw: Any, place: str) -> tuple[str, str] | None:
    if isinstance(raw, str) and HALF.search(raw):
        what = f"{show(raw)} is not Unicode text: half of a character is missing; write it anew"
        return plain(place or "sample"), what
    if isinstance(raw, dict):
        parts = [(place, key) for key in raw] + [(f"{place}.{key}".lstrip("."), raw[key]) for key in raw]
    else:
        parts = [(f"{place}.{i}", value) for i, value in enumerate(raw)] if isinstance(raw, list) else []
    return next((found for where, part in parts if (found := _first_half(part, where))), None)


LONG = 300
"""Characters of a text that are still written whole: a path is."""
PLAIN = {
    "missing": "is missing; add it",
    "string_type": "must be a text, not {input}",
    "dict_type": "must be an object {{...}}, not {input}",
    "model_type": "must be an object {{...}}, not {input}",
    "model_attributes_type": "must be an object {{...}}, not {input}",
    "tuple_type": "must be a list, not {input}",
    "literal_error": "{input} is not known; use system, user or assistant",
    "union_tag_not_found": 'has no `type`; add "type": "text" or "type": "image"',
    "union_tag_invalid": "{input} is of no known `type`; use text or image",
}
"""pydantic's kind of error to what a person is told."""


class _Words(reprlib.Repr):
    """Short, because a value may be long, or nested deeper than repr can go. Found by the name of the type."""

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_str(self, value: str, level: int) -> str:
        self.maxstring = LONG if level == self.maxlevel else 30
        return super().repr_str(value, level)


def show(value: Any) -> str:
    """A value of a sample for a message: on one line, shortened, with the words of JSON, texts in quotes."""
    return _Words().repr(value)


def plain(name: str) -> str:
    """A name or path for a message without quotes, as long as it can do without."""
    return name if name and name.isprintable() and len(name) < LONG else show(name)


def explain(error: ValidationError) -> list[tuple[str, str]]:
    """(field of the v2 object, what is wrong; the remedy) of every problem that ``Conversation`` found."""
    found = []
    for issue in error.errors(include_url=False, include_context=False):
        location = list(issue["loc"])
        if location[2:3] == ["content"] and len(location) > 4:
            del location[4]  # the item's type, which pydantic writes into the path
        name = ".".join(map(str, location)) or "sample"
        what = PLAIN.get(issue["type"], "{message}")
        if name == "task_id" and issue["type"] == "missing":
            what = "is missing; give every sample a name of its own in `task_id` or `id`"
        if name.endswith("content") and issue["type"] == "tuple_type":
            what = "must be a text or a list of items, not {input}"
        found.append((name, what.format(input=show(issue["input"]), message=issue["msg"])))
    return found
