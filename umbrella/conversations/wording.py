"""What a person is told: values as JSON has them, and pydantic's findings in plain words, each on one line."""

import reprlib
from typing import Any

from pydantic import ValidationError

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
