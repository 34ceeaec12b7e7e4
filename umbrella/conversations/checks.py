"""One raw sample to a conversation, or to everything that is wrong with it, in plain words."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from umbrella.conversations.conversation import Conversation
from umbrella.conversations.formats import FormatError, convert, field_in_file, recognise
from umbrella.conversations.images import UNKNOWN, Problems, fault_of_path, is_windows, path_in
from umbrella.conversations.items import image_items, objects_in
from umbrella.conversations.values import half_characters
from umbrella.conversations.wording import explain, show

MAX_TURNS = 10_000
"""Turns that a sample may have."""
DEEP = "is nested too deep; flatten it"


@dataclass(frozen=True)
class PathRewriter:
    """Volume paths as they are written to where they are: first ``path_map``, then ``base`` for relative ones."""

    base: Path
    path_map: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, path: str) -> str:
        path = self.mapped(path)
        return path if is_windows(path) else os.path.abspath(os.path.join(self.base, path))

    def mapped(self, path: str) -> str:
        """With its beginning replaced as ``path_map`` says, and as it was written otherwise."""
        path = path_in(path)
        slashed = _slashed(path)
        for old in sorted(self.path_map, key=len, reverse=True):
            beginning = _slashed(old).rstrip("/")
            if slashed == beginning or slashed.startswith(beginning + "/"):
                return os.path.join(self.path_map[old], slashed[len(beginning) :].lstrip("/"))
        return path


def _slashed(path: str) -> str:
    """A path of Windows with forward slashes; on other systems a backslash is a letter of a file's name."""
    return path.replace("\\", "/") if is_windows(path) or "/" not in path else path


@dataclass
class Checker:
    """Checks samples; each volume file is looked for once.

    Args:
        format: that of every sample, or "auto".
        modalities: the names that are known; None accepts all.
        check_files: look whether each volume file exists.
        questions: as in ``read_conversations``.
    """

    format: str
    modalities: Collection[str] | None
    check_files: bool
    questions: bool = False
    _faults: dict[tuple[str, str], str] = field(default_factory=dict)

    def check(self, raw: Any, rewrite: PathRewriter) -> tuple[Conversation | None, str | None, Problems]:
        """(the conversation, its task_id as far as it has one, problems): no conversation with any problem."""
        conversation = None
        try:
            if half := half_characters(raw):
                return None, None, [half]
            kind = recognise(raw) if self.format == "auto" else self.format
            sample, problems = convert(raw, kind)
            written, turns = raw.get("messages" if kind == "chat" else "conversations"), sample.get("conversations")
            if isinstance(turns, list) and len(turns) > MAX_TURNS:
                return None, None, [("sample", f"has {len(turns)} turns, and a sample may have {MAX_TURNS}; split it")]
            added = len(turns) - len(written) if isinstance(turns, list) and isinstance(written, list) else 0
            if self.questions:
                _leave_open(sample)
            conversation = Conversation.model_validate(sample).with_paths(rewrite)
        except FormatError as error:
            return None, None, error.problems
        except ValidationError as error:
            problems += [(field_in_file(name, kind, added), what) for name, what in explain(error)]
        except (RecursionError, ValueError):  # the latter from with_paths
            return None, None, [("sample", DEEP)]
        problems += [(field_in_file(name, kind, added), what) for name, what in _blank_turns(sample, self.questions)]
        for item in image_items(sample):
            problems += self._check_volume(item, rewrite)
        problems = list(dict.fromkeys(problems))
        task_id = sample.get("task_id")
        named = isinstance(task_id, str) and task_id.strip()
        return None if problems else conversation, task_id if named else None, problems

    def _check_volume(self, item: dict[str, Any], rewrite: PathRewriter) -> Problems:
        modality, path = item.get("modality"), item.get("image_path")
        problems = []
        if self.modalities is not None and isinstance(modality, str) and modality not in (UNKNOWN, *self.modalities):
            known = ", ".join(self.modalities)
            what = f"{show(modality)} is not one of {known}; correct it or add it to `modalities`"
            problems.append(("modality", what))
        if isinstance(path, str) and path != UNKNOWN:
            path, as_written = rewrite(path), rewrite.mapped(path)
            if (path, as_written) not in self._faults:
                self._faults[path, as_written] = fault_of_path(path, as_written, self.check_files)
            if self._faults[path, as_written]:
                problems.append(("image_path", self._faults[path, as_written]))
        return problems


def _leave_open(sample: dict[str, Any]) -> None:
    """Give a sample that ends with a question the turn in which it is to be answered."""
    turns = objects_in(sample, "conversations")
    if turns and turns[-1].get("role") == "user" and turns[-1] is sample["conversations"][-1]:
        sample["conversations"] = [*sample["conversations"], {"role": "assistant", "content": ""}]


def _blank_turns(sample: dict[str, Any], questions: bool) -> Problems:
    """Turns with nothing but blanks. The type allows them: a program may render a turn that is still to be written."""
    problems = []
    turns = objects_in(sample, "conversations")
    if questions and turns and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    for i, turn in enumerate(turns):
        content = turn.get("content")
        texts = [content] if isinstance(content, str) else [item.get("text") for item in objects_in(turn, "content")]
        if texts and all(isinstance(text, str) and not text.strip() for text in texts):
            problems.append((f"conversations.{i}.content", "is empty; write a text, or leave the turn out"))
    return problems
