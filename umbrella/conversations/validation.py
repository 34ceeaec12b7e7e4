"""Validation of raw samples: a sample becomes a conversation or a list of problems."""

import difflib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from umbrella.conversations.formats import FormatError, convert, detect_format, original_field
from umbrella.conversations.images import (
    UNKNOWN,
    Problems,
    dicts_in,
    file_path,
    image_items,
    is_windows_path,
    path_error,
)
from umbrella.conversations.schema import Conversation, Turn
from umbrella.conversations.value_checks import describe_errors, find_surrogate, format_name, format_value

MAX_ITEMS = 10_000
"""Maximum number of turns and items of turns in a sample."""
UNUSED_KEYS = (
    *("tools", "functions", "tool_calls", "function_call", "reasoning", "reasoning_content", "thinking"),
    *("system_prompt", "chosen", "rejected"),
)
"""Keys of samples and turns that other programs use and this one does not."""
DEEP = "is nested too deep; flatten it"


@dataclass(frozen=True)
class PathRewriter:
    """Rewrites volume paths to absolute paths: first by ``path_map``, then relative to ``base``."""

    base: Path
    path_map: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, path: str) -> str:
        path = self.map_prefix(path)
        return path if is_windows_path(path) else os.path.abspath(os.path.join(self.base, path))

    def map_prefix(self, path: str) -> str:
        """Return the path with its prefix replaced according to ``path_map``."""
        path = file_path(path)
        normalised = _forward_slashes(path)
        for old in sorted(self.path_map, key=len, reverse=True):
            prefix = _forward_slashes(old).rstrip("/")
            if normalised == prefix or normalised.startswith(prefix + "/"):
                return os.path.join(self.path_map[old], normalised[len(prefix) :].lstrip("/"))
        return path


def _forward_slashes(path: str) -> str:
    """Return a Windows path with forward slashes. In other paths a backslash belongs to a file name."""
    return path.replace("\\", "/") if is_windows_path(path) or "/" not in path else path


@dataclass
class SampleChecker:
    """Checks samples. Each volume file is checked once.

    Args:
        format: format of all samples, or "auto".
        modalities: accepted modality names; None accepts all.
        check_files: check that each volume file exists.
        allow_unanswered, allow_blank_answers: see ``read_conversations``.
    """

    format: str
    modalities: Collection[str] | None
    check_files: bool
    allow_unanswered: bool = False
    allow_blank_answers: bool = False
    _path_errors: dict[tuple[str, str], str] = field(default_factory=dict)

    def check(self, raw: Any, rewrite: PathRewriter) -> tuple[Conversation | None, Problems]:
        """Return (conversation, problems). The conversation is None if there is a problem."""
        conversation = None
        try:
            if problem := find_surrogate(raw):
                return None, [problem]
            kind = detect_format(raw) if self.format == "auto" else self.format
            sample, problems = convert(raw, kind)
            written, turns = raw.get("messages" if kind == "chat" else "conversations"), sample.get("conversations")
            if (number := _count_items(turns)) > MAX_ITEMS:
                message = f"has {number} turns and items of turns, and a sample may have {MAX_ITEMS}; split it"
                return None, [("sample", message)]
            added = len(turns) - len(written) if isinstance(turns, list) and isinstance(written, list) else 0
            blank = self.allow_unanswered or (self.allow_blank_answers and _has_label(sample))
            if self.allow_unanswered:
                _add_blank_answer(sample)
            conversation = Conversation.model_validate(sample).with_paths(rewrite)
        except FormatError as error:
            return None, error.problems
        except ValidationError as error:
            problems += [(original_field(name, kind, added), message) for name, message in describe_errors(error)]
        except (RecursionError, ValueError):  # ValueError comes from with_paths
            return None, [("sample", DEEP)]
        found = [*_find_blank_turns(sample, blank), *(() if self.allow_unanswered else _check_roles(sample))]
        problems += [(original_field(name, kind, added), message) for name, message in found]
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
            message = f"{format_value(modality)} is not one of {known}; correct it or add it to `modalities`"
            problems.append(("modality", message))
        if isinstance(path, str) and path != UNKNOWN:
            path, as_written = rewrite(path), rewrite.map_prefix(path)
            if (path, as_written) not in self._path_errors:
                self._path_errors[path, as_written] = path_error(path, as_written, self.check_files)
            if self._path_errors[path, as_written]:
                problems.append(("image_path", self._path_errors[path, as_written]))
        return problems


def _has_label(sample: dict[str, Any]) -> bool:
    metadata = sample.get("metadata")
    return isinstance(metadata, dict) and metadata.get("subject_label") is not None


def _count_items(turns: Any) -> int:
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return len(contents) and len(turns) + sum(len(content) for content in contents if isinstance(content, list))


def _add_blank_answer(sample: dict[str, Any]) -> None:
    """Add a blank assistant turn to a sample that ends with a user turn."""
    turns = dicts_in(sample, "conversations")
    if turns and turns[-1].get("role") == "user" and turns[-1] is sample["conversations"][-1]:
        sample["conversations"] = [*sample["conversations"], {"role": "assistant", "content": ""}]


def _check_roles(sample: dict[str, Any]) -> Problems:
    """Find a sample without a user turn, or with one at its end. Other checks find problems of single turns."""
    turns = sample.get("conversations")
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns] if isinstance(turns, list) else []
    if "assistant" not in roles or any(role not in ("system", "user", "assistant") for role in roles):
        return []
    if "user" not in roles:
        return [("conversations", "no user turn, so nothing is asked; add the question")]
    if roles[-1] == "user":
        return [("conversations", "ends with a user turn that nothing answers; add the answer, or leave the turn out")]
    return []


def unusual_features(conversation: Conversation) -> Iterator[str]:
    """Yield notices about unusual but valid features of a sample."""
    parts: list[Turn | Conversation] = [conversation, *conversation.conversations]
    roles = [turn.role for turn in conversation.conversations]
    if any(one == two != "system" for one, two in pairwise(roles)):
        yield "two user or two assistant turns in a row"
    extra = {key for part in parts for key, value in (part.model_extra or {}).items() if value}
    for key in sorted(extra.intersection(UNUSED_KEYS)):
        yield f"`{key}` is kept, but the model does not see it; write what it should see into the turns"
    if conversation.label is None:
        for key in [*(conversation.metadata.keys() - {"subject_label"}), *(conversation.model_extra or {})]:
            if is_misspelt_label(key):
                yield f"`{format_name(key)}` is not read as the label; write it as `metadata.subject_label`"


@cache
def is_misspelt_label(key: str) -> bool:
    """Return whether a key is a misspelt ``subject_label``."""
    return bool(difflib.get_close_matches(key.lower(), ["subject_label"], cutoff=0.85))


def _find_blank_turns(sample: dict[str, Any], allow_last: bool) -> Problems:
    """Find blank turns. ``Conversation`` allows them, because an answer may still have to be generated."""
    problems = []
    turns = dicts_in(sample, "conversations")
    if allow_last and turns and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    for i, turn in enumerate(turns):
        content = turn.get("content")
        texts = [content] if isinstance(content, str) else [item.get("text") for item in dicts_in(turn, "content")]
        if texts and all(isinstance(text, str) and not text.strip() for text in texts):
            problems.append((f"conversations.{i}.content", "is empty; write a text, or leave the turn out"))
    return problems
