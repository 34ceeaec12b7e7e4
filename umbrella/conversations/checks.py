"""One raw sample to a conversation, or to everything that is wrong with it, in plain words."""

import os
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from umbrella.conversations.conversation import Conversation
from umbrella.conversations.formats import FormatError, convert, field_in_file, recognise
from umbrella.conversations.items import UNKNOWN, Problems, image_items, objects_in

DEEP = "is nested too deep; flatten it"
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


@dataclass(frozen=True)
class PathRewriter:
    """Volume paths as they are written to where they are: first ``path_map``, then ``base`` for relative ones."""

    base: Path
    path_map: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, path: str) -> str:
        for old in sorted(self.path_map, key=len, reverse=True):
            beginning = old.rstrip("/")
            if path == beginning or path.startswith(beginning + "/"):
                path = os.path.join(self.path_map[old], path[len(beginning) :].lstrip("/"))
                break
        return os.path.abspath(os.path.join(self.base, path))


@dataclass
class Checker:
    """Checks samples; each volume file is looked for once.

    Args:
        format: that of every sample, or "auto".
        modalities: the names that are known; None accepts all.
        check_files: look whether each volume file exists.
    """

    format: str
    modalities: Collection[str] | None
    check_files: bool
    _on_disk: dict[str, str] = field(default_factory=dict)

    def check(self, raw: Any, rewrite: PathRewriter) -> tuple[Conversation | None, str | None, Problems]:
        """(the conversation, its task_id as far as it has one, problems): no conversation with any problem."""
        conversation = None
        try:
            kind = recognise(raw) if self.format == "auto" else self.format
            sample, problems = convert(raw, kind)
            conversation = Conversation.model_validate(sample).with_paths(rewrite)
        except FormatError as error:
            return None, None, error.problems
        except ValidationError as error:
            problems += [(field_in_file(name, kind), what) for name, what in explain(error)]
        except (RecursionError, ValueError):  # the latter from with_paths
            return None, None, [("sample", DEEP)]
        problems += [(field_in_file(name, kind), what) for name, what in _blank_turns(sample)]
        for item in image_items(sample):
            problems += self._check_volume(item, rewrite)
        problems = list(dict.fromkeys(problems))
        task_id = sample.get("task_id")
        return None if problems else conversation, task_id if isinstance(task_id, str) else None, problems

    def _check_volume(self, item: dict[str, Any], rewrite: PathRewriter) -> Problems:
        modality, path = item.get("modality"), item.get("image_path")
        problems = []
        if self.modalities is not None and isinstance(modality, str) and modality not in (UNKNOWN, *self.modalities):
            known = ", ".join(self.modalities)
            problems.append(("modality", f"{modality!r} is not one of {known}; correct it or add it to `modalities`"))
        if self.check_files and isinstance(path, str) and path != UNKNOWN:
            path = rewrite(path)
            if path not in self._on_disk:
                self._on_disk[path] = _fault_on_disk(path)
            if self._on_disk[path]:
                problems.append(("image_path", self._on_disk[path]))
        return problems


def explain(error: ValidationError) -> Problems:
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
        # reprlib, because the input may be long, or nested deeper than repr can go.
        found.append((name, what.format(input=reprlib.repr(issue["input"]), message=issue["msg"])))
    return found


def _blank_turns(sample: dict[str, Any]) -> Problems:
    """Turns with nothing but blanks. The type allows them: a program may render a turn that is still to be written."""
    problems = []
    for i, turn in enumerate(objects_in(sample, "conversations")):
        content = turn.get("content")
        texts = [content] if isinstance(content, str) else [item.get("text") for item in objects_in(turn, "content")]
        if texts and all(isinstance(text, str) and not text.strip() for text in texts):
            problems.append((f"conversations.{i}.content", "is empty; write a text, or leave the turn out"))
    return problems


def _fault_on_disk(path: str) -> str:
    if os.path.isfile(path):
        return ""
    if os.path.isdir(path):
        return f"{path} is a folder; name the image file"
    return f"{path} does not exist; see `data.root` and `data.path_map`"
