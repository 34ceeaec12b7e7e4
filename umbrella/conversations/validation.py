"""One raw sample to a conversation, or to everything that is wrong with it, in plain words."""

import difflib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from umbrella.conversations.fields import explain, half_characters, plain, show
from umbrella.conversations.formats import FormatError, convert, field_in_file, recognise
from umbrella.conversations.images import UNKNOWN, Problems, fault_of_path, image_items, is_windows, objects_in, path_in
from umbrella.conversations.schema import Conversation, Turn

MAX_PARTS = 10_000
"""Turns, and items of turns, that a sample may have."""
NOT_RENDERED = (
    *("tools", "functions", "tool_calls", "function_call", "reasoning", "reasoning_content", "thinking"),
    *("system_prompt", "chosen", "rejected"),
)
"""Keys of samples and turns that other programs render, or learn from in another way."""
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
        allow_unanswered, allow_blank_answers: see ``read_conversations``.
    """

    format: str
    modalities: Collection[str] | None
    check_files: bool
    allow_unanswered: bool = False
    allow_blank_answers: bool = False
    _faults: dict[tuple[str, str], str] = field(default_factory=dict)

    def check(self, raw: Any, rewrite: PathRewriter) -> tuple[Conversation | None, Problems]:
        """(the conversation, problems): no conversation with any problem."""
        conversation = None
        try:
            if half := half_characters(raw):
                return None, [half]
            kind = recognise(raw) if self.format == "auto" else self.format
            sample, problems = convert(raw, kind)
            written, turns = raw.get("messages" if kind == "chat" else "conversations"), sample.get("conversations")
            if (parts := _count_parts(turns)) > MAX_PARTS:
                what = f"has {parts} turns and items of turns, and a sample may have {MAX_PARTS}; split it"
                return None, [("sample", what)]
            added = len(turns) - len(written) if isinstance(turns, list) and isinstance(written, list) else 0
            blank = self.allow_unanswered or (self.allow_blank_answers and _has_label(sample))
            if self.allow_unanswered:
                _leave_open(sample)
            conversation = Conversation.model_validate(sample).with_paths(rewrite)
        except FormatError as error:
            return None, error.problems
        except ValidationError as error:
            problems += [(field_in_file(name, kind, added), what) for name, what in explain(error)]
        except (RecursionError, ValueError):  # the latter from with_paths
            return None, [("sample", DEEP)]
        found = [*_blank_turns(sample, blank), *(() if self.allow_unanswered else _unasked_or_unanswered(sample))]
        problems += [(field_in_file(name, kind, added), what) for name, what in found]
        for item in image_items(sample):
            problems += self._check_volume(item, rewrite)
        if not problems and any(UNKNOWN in (item["modality"], item["image_path"]) for item in image_items(sample)):
            problems = [("images", f"the file or the modality of an image is {UNKNOWN}; write both")]
        problems = list(dict.fromkeys(problems))
        return None if problems else conversation, problems

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


def _has_label(sample: dict[str, Any]) -> bool:
    metadata = sample.get("metadata")
    return isinstance(metadata, dict) and metadata.get("subject_label") is not None


def _count_parts(turns: Any) -> int:
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return len(contents) and len(turns) + sum(len(content) for content in contents if isinstance(content, list))


def _leave_open(sample: dict[str, Any]) -> None:
    """Give a sample that ends with a question the turn in which it is to be answered."""
    turns = objects_in(sample, "conversations")
    if turns and turns[-1].get("role") == "user" and turns[-1] is sample["conversations"][-1]:
        sample["conversations"] = [*sample["conversations"], {"role": "assistant", "content": ""}]


def _unasked_or_unanswered(sample: dict[str, Any]) -> Problems:
    """A sample without a question, or with one at its end. What is wrong with single turns is found elsewhere."""
    turns = sample.get("conversations")
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns] if isinstance(turns, list) else []
    if "assistant" not in roles or any(role not in ("system", "user", "assistant") for role in roles):
        return []
    if "user" not in roles:
        return [("conversations", "no user turn, so nothing is asked; add the question")]
    if roles[-1] == "user":
        return [("conversations", "ends with a user turn that nothing answers; add the answer, or leave the turn out")]
    return []


def peculiarities(conversation: Conversation) -> Iterator[str]:
    """What is allowed in a sample and yet worth a note, with a remedy where there is one."""
    parts: list[Turn | Conversation] = [conversation, *conversation.conversations]
    roles = [turn.role for turn in conversation.conversations]
    if any(one == two != "system" for one, two in pairwise(roles)):
        yield "two user or two assistant turns in a row"
    extra = {key for part in parts for key, value in (part.model_extra or {}).items() if value}
    for key in sorted(extra.intersection(NOT_RENDERED)):
        yield f"`{key}` is kept, but the model does not see it; write what it should see into the turns"
    if conversation.label is None:
        for key in [*(conversation.metadata.keys() - {"subject_label"}), *(conversation.model_extra or {})]:
            if is_nearly_label(key):
                yield f"`{plain(key)}` is not read as the label; write it as `metadata.subject_label`"


@cache
def is_nearly_label(key: str) -> bool:
    """Whether a key is a misspelt ``subject_label``."""
    return bool(difflib.get_close_matches(key.lower(), ["subject_label"], cutoff=0.85))


def _blank_turns(sample: dict[str, Any], last_may_be: bool) -> Problems:
    """Turns with nothing but blanks. The type allows them: a program may render a turn that is still to be written."""
    problems = []
    turns = objects_in(sample, "conversations")
    if last_may_be and turns and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    for i, turn in enumerate(turns):
        content = turn.get("content")
        texts = [content] if isinstance(content, str) else [item.get("text") for item in objects_in(turn, "content")]
        if texts and all(isinstance(text, str) and not text.strip() for text in texts):
            problems.append((f"conversations.{i}.content", "is empty; write a text, or leave the turn out"))
    return problems
