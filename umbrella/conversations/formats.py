"""Conversion of all accepted formats to the v2 object, which ``Conversation`` then checks.

v2: as in docs/data.md. v1: its ancestor, with the modality in the item type (``image_sMRI``). llava: turns of ``from``
and ``value``, with ``<image>`` in the text. chat: ``messages`` of ``role`` and ``content``.
"""

import re
from typing import Any

from umbrella.conversations.images import (
    IMAGE_TOKEN,
    Problems,
    assign_files,
    assign_modalities,
    dicts_in,
    file_path,
    image_items,
    is_well_formed,
    str_or_unknown,
    to_v2_turn,
)
from umbrella.conversations.value_checks import format_name, format_value, is_flag

FORMATS = ("v2", "v1", "llava", "chat")
SAMPLE_KEYS = ("task_id", "task_type", "image", "images", "metadata", "subject_ids")
"""Keys that identify a v1 or v2 sample without turns."""


class FormatError(ValueError):
    """A sample has no accepted format or contradicts its format. ``problems`` lists all reasons."""

    def __init__(self, problems: Problems) -> None:
        super().__init__("\n".join(f"{field}: {message}" for field, message in problems))
        self.problems = problems


def detect_format(raw: Any) -> str:
    """Detect the format of a sample, one of ``FORMATS``, from its keys.

    Raises:
        FormatError: the keys match no format.
    """
    if not isinstance(raw, dict):
        raise FormatError([("sample", f"must be an object {{...}}, not {format_value(raw)}")])
    turns = dicts_in(raw, "conversations")
    if "conversations" in raw:
        if any("from" in turn or "value" in turn for turn in turns) or (not turns and "image" in raw):
            return "llava"
        types = [str(item.get("type")) for turn in turns for item in dicts_in(turn, "content")]
        old = "id" in raw and "task_id" not in raw and "images" not in raw
        return "v1" if old or any(kind.startswith("image_") for kind in types) else "v2"
    if "messages" in raw:
        return "chat"
    if any(key in raw for key in SAMPLE_KEYS):
        legacy = "chat" if "images" in raw else "v1"
        return legacy if "id" in raw and "task_id" not in raw else "v2"
    keys = f"the keys {', '.join(map(format_name, list(raw)[:12]))}" if raw else "no keys"
    known = "v2 and v1 (`conversations` with `role`), llava (`conversations` with `from`), chat (`messages`)"
    raise FormatError([("sample", f"has {keys}, which is no known format; accepted are {known}")])


def convert(raw: Any, format: str) -> tuple[dict[str, Any], Problems]:
    """Convert a sample to v2. ``raw`` is not changed; unknown keys are kept.

    Args:
        raw: the sample.
        format: one of ``FORMATS``.

    Returns:
        The v2 object, as far as it can be converted, and the problems of the conversion. ``Conversation`` finds the
        problems that any format can have.

    Raises:
        FormatError: the format is unknown, or the sample is not an object.
    """
    if format not in FORMATS:
        raise FormatError([("format", f"{format!r} is not known; use auto, {', '.join(FORMATS)}")])
    if not isinstance(raw, dict):
        detect_format(raw)
    sample = dict(raw)
    external = format in ("llava", "chat")
    files_key = "image" if "image" in raw else "images"
    files = sample.pop(files_key, None) if external else None
    files = [] if files is None else [file_path(file) for file in (files if isinstance(files, list) else [files])]
    key = "messages" if format == "chat" else "conversations"
    if key in sample:
        turns = sample.pop(key)
        if isinstance(turns, list):
            turns = [to_v2_turn(turn, format, split=format == "llava" or bool(files)) for turn in turns]
        sample["conversations"] = turns
    problems = _apply_loss_mask(sample)
    problems += _add_system_turn(sample, format, split=format == "llava" or bool(files))
    items, complete = image_items(sample), is_well_formed(sample)
    if external:
        noun = ("" if format == "llava" else "image items and ") + f"`{IMAGE_TOKEN}` placeholders"
        problems += assign_files(items, files, files_key, noun, complete)
        problems += assign_modalities(items, sample, complete)
    if format != "v2":
        _add_v2_fields(sample, items, files if len(files) == len(items) else [])
    if format == "v1":
        _rename_labels(sample)
    if complete:
        problems += _check_placeholders(sample, len(items), format)
    return sample, problems


def original_field(field: str, format: str, added: int = 0) -> str:
    """Return the name of a v2 field in the file, such as ``messages.0.role`` for ``conversations.0.role`` in chat.

    Args:
        field: field of the v2 object.
        format: format of the file.
        added: number of turns that ``convert`` added before those of the file.
    """
    names = {"llava": {"role": "from", "content": "value"}, "chat": {"conversations": "messages"}}.get(format, {})
    parts = field.split(".")
    if parts[0] == "conversations" and parts[1:2] and parts[1].isdigit():
        if int(parts[1]) < added:
            return "system"
        parts[1] = str(int(parts[1]) - added)
    if format == "llava" and "content" in parts:
        parts = parts[: parts.index("content") + 1]  # a value is one text, so the file has no items
    return ".".join(names.get(part, part) for part in parts)


def _apply_loss_mask(sample: dict[str, Any]) -> Problems:
    """Copy the flags of ``loss_mask``, one for each turn, to ``loss`` of the turns."""
    mask, turns = sample.pop("loss_mask", None), sample.get("conversations")
    if mask is None or not isinstance(turns, list):
        return []
    if not isinstance(mask, list) or not all(map(is_flag, mask)):
        message = "must be a list of true or false, or 1 or 0, one for each turn, not "
        return [("loss_mask", message + format_value(mask))]
    if len(mask) != len(turns):
        return [("loss_mask", f"has {len(mask)} entries for {len(turns)} turns; write one for each turn")]
    problems = []
    for i, (turn, flag) in enumerate(zip(turns, mask, strict=True)):
        if isinstance(turn, dict):
            if is_flag(turn.get("loss")) and turn["loss"] != flag:
                problems.append((f"loss_mask.{i}", "contradicts the `loss` of this turn; keep one of them"))
            turn["loss"] = bool(flag)
    return problems


def _add_system_turn(sample: dict[str, Any], format: str, split: bool) -> Problems:
    """Add the ``system`` text of the sample as its first turn, unless a system turn has the same text."""
    text, turns = sample.get("system"), sample.get("conversations")
    if text is None or not isinstance(turns, list):
        return []
    if not isinstance(text, str):
        return [("system", f"must be a text, not {format_value(text)}")]
    del sample["system"]
    written = [
        "\n".join(str(i.get("text")) for i in dicts_in(turn, "content")) or str(turn.get("content"))
        for turn in dicts_in(sample, "conversations")
        if turn.get("role") == "system"
    ]
    if text.strip() and text.strip() not in map(str.strip, written):
        if written:
            return [("system", "differs from the text of the system turn; keep one of them")]
        turns.insert(0, to_v2_turn({"role": "system", "content": text}, format, split))
    return []


def _add_v2_fields(sample: dict[str, Any], items: list[dict[str, Any]], files: list[Any]) -> None:
    """Add the fields that exist only in v2."""
    if "task_id" not in sample and "id" in sample:
        name = sample.pop("id")
        sample["task_id"] = str(name) if isinstance(name, int) else name
    paths = files or [item.get("image_path") for item in items]
    images = [
        {"path": str_or_unknown(path), "modality": str_or_unknown(item.get("modality"))}
        for path, item in zip(paths, items, strict=True)
    ]
    sample.setdefault("images", images)
    metadata = sample.get("metadata")
    subjects = sample.get("subject_ids")
    subjects = set(map(str, subjects if isinstance(subjects, list) else []))
    if isinstance(metadata, dict):
        subjects |= {str(metadata[key]) for key in ("subject_id", "reference_id") if metadata.get(key) is not None}
    turns = [turn for turn in dicts_in(sample, "conversations") if turn.get("role") != "system"]
    several = "T3" if len(subjects) > 1 or len(turns) > 2 else "T2"
    sample.setdefault("task_type", several if len(items) > 1 else "T1")


def _rename_labels(sample: dict[str, Any]) -> None:
    """Add v1 metadata under the v2 names."""
    if not isinstance(sample.get("metadata"), dict):
        return
    metadata = dict(sample["metadata"])
    for new, old in (("subject_label", "subject_sex"), ("reference_label", "reference_sex")):
        if old in metadata:
            metadata.setdefault(new, metadata[old])
    if "subject_sex" in metadata and "task" not in metadata:
        metadata.setdefault("target", "sex")
    if metadata.get("comparison_type") in ("same_sex", "different_sex"):
        metadata["comparison_type"] = metadata["comparison_type"].removesuffix("_sex")
    sample["metadata"] = metadata


def _check_placeholders(sample: dict[str, Any], images: int, format: str) -> Problems:
    """Check that the texts contain either no image tokens or one for each image item."""
    tokens = {image["token"] for image in dicts_in(sample, "images") if isinstance(image.get("token"), str)} - {""}
    pattern = "|".join(map(re.escape, sorted(tokens))) or (r"<image_\w+>" if format == "v1" else IMAGE_TOKEN)
    turns = dicts_in(sample, "conversations")
    texts = [turn.get("content") for turn in turns] + [i.get("text") for t in turns for i in dicts_in(t, "content")]
    found = [token for text in texts if isinstance(text, str) for token in re.findall(pattern, text)]
    if len(found) in (0, images):
        return []
    counts = f"the number of {found[0]} in the texts is {len(found)}, that of image items is {images}"
    return [("messages" if format == "chat" else "conversations", f"{counts}; there must be one for each")]
