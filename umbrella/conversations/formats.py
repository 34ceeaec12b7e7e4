"""The formats that a sample may come in. Each becomes the v2 object, which ``Conversation`` then checks.

v2: as in docs/data.md. v1: its ancestor, with the modality in the item type (``image_sMRI``). llava: turns of ``from``
and ``value``, with ``<image>`` in the text. chat: ``messages`` of ``role`` and ``content``.
"""

import re
from typing import Any

from umbrella.conversations.fields import is_flag, plain, show
from umbrella.conversations.images import (
    TOKEN,
    Problems,
    image_items,
    images_can_be_counted,
    name_files,
    objects_in,
    path_in,
    tell_modalities,
    text_or_unknown,
    v2_turn,
)

FORMATS = ("v2", "v1", "llava", "chat")
TELLING = ("task_id", "task_type", "image", "images", "metadata", "subject_ids")
"""Keys that tell a sample of ours, though its turns are missing."""


class FormatError(ValueError):
    """A sample that is of no accepted format, or contradicts its format; ``problems`` has every reason."""

    def __init__(self, problems: Problems) -> None:
        super().__init__("\n".join(f"{field}: {what}" for field, what in problems))
        self.problems = problems


def recognise(raw: Any) -> str:
    """The format of a sample, one of ``FORMATS``, told from its keys.

    Raises:
        FormatError: it has the keys of none.
    """
    if not isinstance(raw, dict):
        raise FormatError([("sample", f"must be an object {{...}}, not {show(raw)}")])
    turns = objects_in(raw, "conversations")
    if "conversations" in raw:
        if any("from" in turn or "value" in turn for turn in turns) or (not turns and "image" in raw):
            return "llava"
        types = [str(item.get("type")) for turn in turns for item in objects_in(turn, "content")]
        old = "id" in raw and "task_id" not in raw and "images" not in raw
        return "v1" if old or any(kind.startswith("image_") for kind in types) else "v2"
    if "messages" in raw:
        return "chat"
    if any(key in raw for key in TELLING):
        old_or_chat = "chat" if "images" in raw else "v1"
        return old_or_chat if "id" in raw and "task_id" not in raw else "v2"
    keys = f"the keys {', '.join(map(plain, list(raw)[:12]))}" if raw else "no keys"
    known = "v2 and v1 (`conversations` with `role`), llava (`conversations` with `from`), chat (`messages`)"
    raise FormatError([("sample", f"has {keys}, which is no known format; accepted are {known}")])


def to_v2(raw: Any, format: str = "auto", modality: str = "") -> dict[str, Any]:
    """A sample of any format as a v2 object; ``raw`` stays as it is, and keys that mean nothing here are kept.

    Args:
        format: one of ``FORMATS``, or "auto" to tell it from the keys.
        modality: that of llava and chat volumes whose sample states none; without it the file's BIDS suffix tells.

    Raises:
        FormatError: with every problem of the conversion. What any format can have wrong is left to ``Conversation``.
    """
    sample, problems = convert(raw, recognise(raw) if format == "auto" else format, modality)
    if problems:
        raise FormatError(problems)
    return sample


def convert(raw: Any, format: str, modality: str = "") -> tuple[dict[str, Any], Problems]:
    """As ``to_v2`` for one of ``FORMATS``, with the problems beside as much of the sample as can be had."""
    if format not in FORMATS:
        raise FormatError([("format", f"{format!r} is not known; use auto, {', '.join(FORMATS)}")])
    if not isinstance(raw, dict):
        recognise(raw)
    sample = dict(raw)
    outside = format in ("llava", "chat")
    files_key = "image" if "image" in raw else "images"
    files = sample.pop(files_key, None) if outside else None
    files = [] if files is None else [path_in(file) for file in (files if isinstance(files, list) else [files])]
    key = "messages" if format == "chat" else "conversations"
    if key in sample:
        turns = sample.pop(key)
        if isinstance(turns, list):
            turns = [v2_turn(turn, format, cut=format == "llava" or bool(files)) for turn in turns]
        sample["conversations"] = turns
    problems = _spread_loss_mask(sample)
    problems += _add_system_turn(sample, format, cut=format == "llava" or bool(files))
    shown, whole = image_items(sample), images_can_be_counted(sample)
    if outside:
        places = f"`{TOKEN}` placeholders" if format == "llava" else f"image items and `{TOKEN}` placeholders"
        problems += name_files(shown, files, files_key, places, whole)
        problems += tell_modalities(shown, sample, modality, whole)
    if format != "v2":
        _complete(sample, shown, files if len(files) == len(shown) else [])
    if format == "v1":
        _rename_labels(sample)
    if whole:
        problems += _count_tokens(sample, len(shown), format)
    return sample, problems


def field_in_file(field: str, format: str, added: int = 0) -> str:
    """A field of the v2 object under its name in the file: ``messages.0.role`` for ``conversations.0.role`` in chat.

    Args:
        added: how many turns ``convert`` put before those of the file.
    """
    names = {"llava": {"role": "from", "content": "value"}, "chat": {"conversations": "messages"}}.get(format, {})
    parts = field.split(".")
    if parts[0] == "conversations" and parts[1:2] and parts[1].isdigit():
        if int(parts[1]) < added:
            return "system"
        parts[1] = str(int(parts[1]) - added)
    if format == "llava" and "content" in parts:
        parts = parts[: parts.index("content") + 1]  # a value is one text: its items have no place in the file
    return ".".join(names.get(part, part) for part in parts)


def _spread_loss_mask(sample: dict[str, Any]) -> Problems:
    """Write the sample's ``loss_mask``, a list of one flag for each turn, into the turns as ``loss``."""
    mask, turns = sample.pop("loss_mask", None), sample.get("conversations")
    if mask is None or not isinstance(turns, list):
        return []
    if not isinstance(mask, list) or not all(map(is_flag, mask)):
        return [("loss_mask", f"must be a list of true or false, or 1 or 0, one for each turn, not {show(mask)}")]
    if len(mask) != len(turns):
        return [("loss_mask", f"has {len(mask)} entries for {len(turns)} turns; write one for each turn")]
    problems = []
    for i, (turn, flag) in enumerate(zip(turns, mask, strict=True)):
        if isinstance(turn, dict):
            if is_flag(turn.get("loss")) and turn["loss"] != flag:
                problems.append((f"loss_mask.{i}", "contradicts the `loss` of this turn; keep one of them"))
            turn["loss"] = bool(flag)
    return problems


def _add_system_turn(sample: dict[str, Any], format: str, cut: bool) -> Problems:
    """Make the sample's ``system`` text its first turn, unless a system turn says the same."""
    text, turns = sample.get("system"), sample.get("conversations")
    if text is None or not isinstance(turns, list):
        return []
    if not isinstance(text, str):
        return [("system", f"must be a text, not {show(text)}")]
    del sample["system"]
    written = [
        "\n".join(str(i.get("text")) for i in objects_in(turn, "content")) or str(turn.get("content"))
        for turn in objects_in(sample, "conversations")
        if turn.get("role") == "system"
    ]
    if text.strip() and text.strip() not in map(str.strip, written):
        if written:
            return [("system", "differs from the text of the system turn; keep one of them")]
        turns.insert(0, v2_turn({"role": "system", "content": text}, format, cut))
    return []


def _complete(sample: dict[str, Any], shown: list[dict[str, Any]], files: list[Any]) -> None:
    """Add the fields that only v2 has."""
    if "task_id" not in sample and "id" in sample:
        name = sample.pop("id")
        sample["task_id"] = str(name) if isinstance(name, int) else name
    paths = files or [item.get("image_path") for item in shown]
    images = [
        {"path": text_or_unknown(path), "modality": text_or_unknown(item.get("modality"))}
        for path, item in zip(paths, shown, strict=True)
    ]
    sample.setdefault("images", images)
    metadata = sample.get("metadata")
    people = sample.get("subject_ids")
    people = set(map(str, people if isinstance(people, list) else []))
    if isinstance(metadata, dict):
        people |= {str(metadata[key]) for key in ("subject_id", "reference_id") if metadata.get(key) is not None}
    turns = [turn for turn in objects_in(sample, "conversations") if turn.get("role") != "system"]
    several = "T3" if len(people) > 1 or len(turns) > 2 else "T2"
    sample.setdefault("task_type", several if len(shown) > 1 else "T1")


def _rename_labels(sample: dict[str, Any]) -> None:
    """Put v1 metadata under the names of v2, beside the old ones."""
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


def _count_tokens(sample: dict[str, Any], images: int, format: str) -> Problems:
    """Texts that hold image tokens beside the image items must hold one for each."""
    tokens = {image["token"] for image in objects_in(sample, "images") if isinstance(image.get("token"), str)} - {""}
    pattern = "|".join(map(re.escape, sorted(tokens))) or (r"<image_\w+>" if format == "v1" else TOKEN)
    turns = objects_in(sample, "conversations")
    texts = [turn.get("content") for turn in turns] + [i.get("text") for t in turns for i in objects_in(t, "content")]
    found = [token for text in texts if isinstance(text, str) for token in re.findall(pattern, text)]
    if len(found) in (0, images):
        return []
    counts = f"the number of {found[0]} in the texts is {len(found)}, that of image items is {images}"
    return [("messages" if format == "chat" else "conversations", f"{counts}; there must be one for each")]
