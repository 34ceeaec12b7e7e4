"""Checks of the values of a sample, and the messages about invalid ones."""

import json
import re
import reprlib
from collections.abc import Iterator
from math import isfinite
from typing import Any

from pydantic import ValidationError

CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Control characters, which names must not contain."""
LOSS_FLAGS = ("loss", "weight", "train")
"""Keys of a turn that include it in the training loss or exclude it: true or false, 1 or 0."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Unpaired surrogates, which JSON can contain (``\\ud800``) but Unicode text cannot."""

Finding = tuple[tuple[str | int, ...], str]
"""(location, message)."""


def find_invalid_values(raw: Any) -> Iterator[Finding]:
    """Yield the invalid identifiers, labels and loss flags of a raw v2 sample. Malformed objects are ignored."""
    if not isinstance(raw, dict):
        return
    for key, remedy in (("task_id", "give every sample a name of its own"), ("task_type", "name the task, as in T1")):
        if isinstance(raw.get(key), str):
            yield from _check_identifier((key,), raw[key], remedy)
    subjects = raw.get("subject_ids")
    if isinstance(subjects, list):
        for i, subject in enumerate(subjects):
            yield from _check_identifier(("subject_ids", i), subject, "name a subject, or leave it out")
    elif subjects is not None:
        yield ("subject_ids",), f"must be a list, not {format_value(subjects)}"
    yield from _check_loss_flags(raw.get("conversations"))
    metadata = raw.get("metadata")
    for key in ("subject_id", "patient_id", "reference_id", "family_id"):
        if raw.get(key) is not None:
            yield from _check_identifier((key,), raw[key], "name the subject, or leave it out")
        if isinstance(metadata, dict) and metadata.get(key) is not None:
            yield from _check_identifier(("metadata", key), metadata[key], "name the subject, or leave it out")
    if isinstance(metadata, dict):
        label = metadata.get("subject_label")
        if not (label is None or isinstance(label, str) or _is_number(label)):
            yield ("metadata", "subject_label"), f"must be a text or a finite number, not {format_value(label)}"
        if isinstance(label, str) and not label.strip():
            yield ("metadata", "subject_label"), "is empty; write the label, or leave it out"
        key = "target" if metadata.get("target") is not None else "task"
        if not isinstance(metadata.get(key), str | None):
            yield ("metadata", key), f"must be a text, not {format_value(metadata[key])}"


def _check_loss_flags(turns: Any) -> Iterator[Finding]:
    for i, turn in enumerate(turns if isinstance(turns, (list, tuple)) else ()):
        flags = {key: turn[key] for key in LOSS_FLAGS if turn.get(key) is not None} if isinstance(turn, dict) else {}
        wrong = [(key, value) for key, value in flags.items() if not is_flag(value)]
        for key, value in wrong:
            yield ("conversations", i, key), f"must be true or false, or 1 or 0, not {format_value(value)}"
        if not wrong and len({bool(value) for value in flags.values()}) > 1:
            written = ", ".join(f"{key}: {format_value(value)}" for key, value in flags.items())
            yield ("conversations", i), f"its loss flags contradict each other ({written}); keep one of them"


def is_flag(value: Any) -> bool:
    """Return whether the value is true, false, 1 or 0."""
    return isinstance(value, bool | int | float) and value in (0, 1)


def _check_identifier(location: tuple[str | int, ...], name: Any, remedy: str) -> Iterator[Finding]:
    if not (isinstance(name, str) or _is_number(name)):
        yield location, f"must be a text or a number, not {format_value(name)}"
    elif not str(name).strip():
        yield location, f"is empty; {remedy}"
    elif CONTROL_CHARACTER.search(str(name)):
        yield location, f"{format_value(name)} holds a line break or another control character; leave it out"


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def find_surrogate(raw: Any) -> tuple[str, str] | None:
    """Return (field, message) of the first text or key with an unpaired surrogate, or None."""
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return _first_surrogate(raw, "")
    return None


def _first_surrogate(raw: Any, field: str) -> tuple[str, str] | None:
    if isinstance(raw, str) and SURROGATE.search(raw):
        message = f"{format_value(raw)} is not Unicode text: half of a character is missing; write it anew"
        return format_name(field or "sample"), message
    if isinstance(raw, dict):
        parts = [(field, key) for key in raw] + [(f"{field}.{key}".lstrip("."), raw[key]) for key in raw]
    else:
        parts = [(f"{field}.{i}", value) for i, value in enumerate(raw)] if isinstance(raw, list) else []
    return next((found for name, part in parts if (found := _first_surrogate(part, name))), None)


MAX_SHOWN = 300
"""Maximum number of characters of a text in a message; longer texts are shortened."""
MESSAGES = {
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
"""Error type of pydantic to message."""


class _JsonRepr(reprlib.Repr):
    """Shortened representation with JSON's literals; ``reprlib`` selects methods by the name of the type."""

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_str(self, value: str, level: int) -> str:
        self.maxstring = MAX_SHOWN if level == self.maxlevel else 30
        return super().repr_str(value, level)


def format_value(value: Any) -> str:
    """Format a value for a message: one line, shortened, JSON literals, texts in quotes."""
    return _JsonRepr().repr(value)


def format_name(name: str) -> str:
    """Format a name or path for a message; quotes are added only if necessary."""
    return name if name and name.isprintable() and len(name) < MAX_SHOWN else format_value(name)


def describe_errors(error: ValidationError) -> list[tuple[str, str]]:
    """Return (field of the v2 object, message) of every problem that ``Conversation`` found."""
    found = []
    for issue in error.errors(include_url=False, include_context=False):
        location = list(issue["loc"])
        if location[2:3] == ["content"] and len(location) > 4:
            del location[4]  # pydantic adds the item's type to the path
        name = ".".join(map(str, location)) or "sample"
        what = MESSAGES.get(issue["type"], "{message}")
        if name == "task_id" and issue["type"] == "missing":
            what = "is missing; give every sample a name of its own in `task_id` or `id`"
        if name.endswith("content") and issue["type"] == "tuple_type":
            what = "must be a text or a list of items, not {input}"
        found.append((name, what.format(input=format_value(issue["input"]), message=issue["msg"])))
    return found
