"""Validation of raw samples: a sample becomes a conversation or a list of problems."""

import difflib
import re
from collections.abc import Callable, Collection, Iterator
from functools import cache
from itertools import pairwise
from math import isfinite
from typing import Any

from pydantic import ValidationError

from umbrella.base import format_name, format_value
from umbrella.conversations.formats import (
    Problems,
    SampleError,
    complete,
    detect_format,
    image_items,
    is_flag,
    original_field,
    rename_keys,
)
from umbrella.conversations.schema import LOSS_FLAGS, PARAPHRASE, Conversation, Turn

CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Control characters, which names must not contain."""
UNUSED_KEYS = (
    *("tools", "functions", "tool_calls", "function_call", "reasoning", "reasoning_content", "thinking"),
    *("system_prompt", "chosen", "rejected"),
)
"""Keys of samples and turns that other programs use and this one does not."""
OBJECT = "must be an object {{...}}, not {input}"
MESSAGES = {
    "missing": "is missing; add it",
    "string_type": "must be a text, not {input}",
    "dict_type": OBJECT,
    "model_type": OBJECT,
    "model_attributes_type": OBJECT,
    "tuple_type": "must be a list, not {input}",
    "literal_error": "{input} is not known; use system, user or assistant",
    "union_tag_not_found": 'has no `type`; add "type": "text" or "type": "image"',
    "union_tag_invalid": "{input} is of no known `type`; use text or image",
}
"""Error type of pydantic to message."""


def parse_sample(
    raw: Any,
    find_volume: Callable[[str], tuple[str, str]],
    format: str,
    modalities: Collection[str] | None,
    allow_unanswered: bool,
    allow_blank_answers: bool,
) -> Conversation:
    """Convert a sample to a conversation. Other checks than those of types need a sample without errors of type.

    Args:
        raw: the sample; not changed.
        find_volume: path in the sample to (absolute path, problem or "").
        format, modalities, allow_unanswered, allow_blank_answers: see ``read_conversations``.

    Raises:
        SampleError: with all problems, by the names of the fields in the file.
    """
    if not isinstance(raw, dict):
        raise SampleError([("sample", f"must be an object {{...}}, not {format_value(raw)}")])
    format = detect_format(raw) if format == "auto" else format
    sample = rename_keys(raw, format)
    turns = sample.get("conversations")
    if allow_unanswered and isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        sample["conversations"] = turns + [{"role": "assistant", "content": ""}] * (turns[-1].get("role") == "user")
    try:
        Conversation.model_validate(sample)
        problems, count = complete(sample, format), len(sample["conversations"])
        blank = allow_unanswered or (
            allow_blank_answers and sample.get("metadata", {}).get("subject_label") is not None
        )
        problems += [*_check_values(sample), *_check_labels(sample), *_check_turns(sample, blank)]
        problems += _insert_system_turn(sample)
        for item in image_items(sample):
            if modalities is not None and item["modality"] and item["modality"] not in modalities:
                known = f"{format_value(item['modality'])} is not one of {', '.join(modalities)}"
                problems.append(("modality", f"{known}; correct it or add it to `modalities`"))
            item["image_path"], error = find_volume(item["image_path"])
            problems += [("image_path", error)] if error else []
        if not problems:
            if labels := sample.get("metadata", {}).get("labels"):
                inserted = len(sample["conversations"]) - count
                shifted = [entry | {"turn": entry["turn"] + inserted} for entry in labels]
                sample["metadata"] = sample["metadata"] | {"labels": shifted}
            return Conversation.model_validate(sample)
    except ValidationError as error:
        problems = _describe_errors(error)
    raise SampleError([(original_field(name, format), message) for name, message in dict.fromkeys(problems)])


def _describe_errors(error: ValidationError) -> Problems:
    found = []
    for issue in error.errors(include_url=False, include_context=False):
        location = list(issue["loc"])
        if location[2:3] == ["content"] and len(location) > 4:
            del location[4]  # pydantic adds the item's type to the path
        name = ".".join(map(str, location))
        message = MESSAGES.get(issue["type"], "{message}")
        if name == "task_id" and issue["type"] == "missing":
            message = "is missing; give every sample a name of its own in `task_id` or `id`"
        if name.endswith("content") and issue["type"] == "tuple_type":
            message = "must be a text or a list of items, not {input}"
        found.append((name, message.format(input=format_value(issue["input"]), message=issue["msg"])))
    return found


def _check_values(sample: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the invalid identifiers, labels, loss flags and paraphrases of a well-formed sample."""
    metadata = sample.get("metadata", {})
    names = {key: sample[key] for key in ("task_id", "task_type")}
    for prefix, place in (("", sample), ("metadata.", metadata)):
        for key in ("subject_id", "patient_id", "reference_id", "family_id"):
            if place.get(key) is not None:
                names[prefix + key] = place[key]
    subjects = sample.get("subject_ids")
    if isinstance(subjects, list):
        names |= {f"subject_ids.{i}": subject for i, subject in enumerate(subjects)}
    elif subjects is not None:
        yield "subject_ids", f"must be a list, not {format_value(subjects)}"
    for field, name in names.items():
        if not (isinstance(name, str) or _is_number(name)):
            yield field, f"must be a text or a number, not {format_value(name)}"
        elif not str(name).strip():
            yield field, "is empty; write a name"
        elif CONTROL_CHARACTER.search(str(name)):
            yield field, f"{format_value(name)} holds a line break or another control character; leave it out"
    yield from _check_label("metadata.subject_label", metadata.get("subject_label"))
    yield from _check_candidates("metadata.", metadata, metadata.get("subject_label"))
    key = "target" if metadata.get("target") is not None else "task"
    if not isinstance(metadata.get(key), str | None):
        yield f"metadata.{key}", f"must be a text, not {format_value(metadata[key])}"
    for i, turn in enumerate(sample["conversations"]):
        for key in LOSS_FLAGS:
            if turn.get(key) is not None and not is_flag(turn[key]):
                message = f"must be true or false, or 1 or 0, not {format_value(turn[key])}"
                yield f"conversations.{i}.{key}", message
        for j, item in enumerate(turn["content"]):
            if isinstance(item, dict) and not isinstance(item.get(PARAPHRASE), str | None):
                message = f"must be a text, not {format_value(item[PARAPHRASE])}"
                yield f"conversations.{i}.content.{j}.{PARAPHRASE}", message


def _check_label(field: str, label: Any) -> Iterator[tuple[str, str]]:
    if not (label is None or isinstance(label, str) or _is_number(label)):
        yield field, f"must be a text or a finite number, not {format_value(label)}"
    if isinstance(label, str) and not label.strip():
        yield field, "is empty; write the label, or leave it out"


def _check_candidates(place: str, metadata: dict[str, Any], label: Any) -> Iterator[tuple[str, str]]:
    """Yield the problems of the ``candidates`` of a sample, or of an entry of ``metadata.labels``."""
    field, found = f"{place}candidates", metadata.get("candidates")
    if found is None:
        return
    texts = list(found.values()) if isinstance(found, dict) else found
    labels = list(found) if isinstance(found, dict) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in (*texts, *labels)):
        yield field, f"must be a list of texts, or an object of label and text, not {format_value(found)}"
    elif len(texts) < 2:
        yield field, f"has {len(texts)} of the two or more answers to choose from; add the others"
    elif any(len({" ".join(one.split()).casefold() for one in ones}) < len(ones) for ones in (labels, texts)):
        yield field, "has two that are equal, or differ by case or blanks only; give each a text of its own"
    elif label is not None and label not in labels:
        known = ", ".join(map(format_value, labels))
        yield (
            field,
            f"lacks the label {format_value(label)}, it has {known}; add it, or write one of these as the label",
        )


def _check_labels(sample: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the invalid entries of ``metadata.labels``, and a ``subject_label`` that contradicts them."""
    metadata, turns = sample.get("metadata", {}), sample["conversations"]
    labels = metadata.get("labels", [])
    if not isinstance(labels, list):
        yield "metadata.labels", f"must be a list of {{turn, target, label}}, not {format_value(labels)}"
        return
    known: dict[tuple[int, str], Any] = {}
    for i, entry in enumerate(labels):
        field = f"metadata.labels.{i}"
        if not isinstance(entry, dict) or entry.keys() - {"candidates"} != {"turn", "target", "label"}:
            yield field, f"must be an object of turn, target and label, not {format_value(entry)}"
            continue
        turn, target = entry["turn"], entry["target"]
        problems = [*_check_label(f"{field}.label", entry["label"])]
        problems += _check_candidates(f"{field}.", entry, entry["label"])
        if not isinstance(turn, int) or isinstance(turn, bool) or not 0 <= turn < len(turns):
            problems.append((f"{field}.turn", f"{format_value(turn)} is no index of a turn, 0 to {len(turns) - 1}"))
        elif turns[turn]["role"] != "assistant":
            message = f"{turn} is a {turns[turn]['role']} turn; give the index of the answer, counted from 0"
            problems.append((f"{field}.turn", message))
        if not isinstance(target, str) or not target.strip() or CONTROL_CHARACTER.search(target):
            problems.append((f"{field}.target", f"must be a name, not {format_value(target)}"))
        yield from problems
        if not problems and (turn, target) in known:
            yield field, f"turn {turn} has a label of {format_value(target)} already; leave one out"
        elif not problems:
            known[turn, target] = entry["label"]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    target, label = metadata.get("target") or metadata.get("task") or sample["task_type"], metadata.get("subject_label")
    if label is not None and isinstance(target, str) and (last, target) in known and known[last, target] != label:
        message = f"is {format_value(label)}, and `metadata.labels` has {format_value(known[last, target])}"
        yield "metadata.subject_label", f"{message} for this answer; correct one of them"


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _check_turns(sample: dict[str, Any], allow_blank: bool) -> Iterator[tuple[str, str]]:
    """Yield blank turns, and problems of the order of turns. ``allow_blank``: the last answer may be blank."""
    turns = sample["conversations"]
    for i, turn in enumerate(turns):
        texts = turn["content"] if isinstance(turn["content"], list) else [{"text": turn["content"]}]
        if not any(item.get("text", "image").strip() for item in texts) and not (
            allow_blank and i == len(turns) - 1 and turn["role"] == "assistant"
        ):
            yield f"conversations.{i}.content", "is empty; write a text, or leave the turn out"
    if all(turn["role"] != "user" for turn in turns):
        yield "conversations", "no user turn, so nothing is asked; add the question"
    elif turns[-1]["role"] == "user":
        yield "conversations", "ends with a user turn that nothing answers; add the answer, or leave the turn out"


def _insert_system_turn(sample: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Make the ``system`` text of the sample its first turn, unless a system turn has the same text."""
    text, turns = sample.pop("system", None), sample["conversations"]
    if not isinstance(text, str | None):
        yield "system", f"must be a text, not {format_value(text)}"
    elif text and text.strip():
        contents = [turn["content"] for turn in turns if turn["role"] == "system"]
        written = [c if isinstance(c, str) else "\n".join(item.get("text", "") for item in c) for c in contents]
        if text.strip() not in map(str.strip, written):
            if written:
                yield "system", "differs from the text of the system turn; keep one of them"
            sample["conversations"] = [{"role": "system", "content": text}, *turns]


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
            if _is_misspelt_label(key):
                yield f"`{format_name(key)}` is not read as the label; write it as `metadata.subject_label`"


@cache
def _is_misspelt_label(key: str) -> bool:
    return bool(difflib.get_close_matches(key.lower(), ["subject_label"], cutoff=0.85))
