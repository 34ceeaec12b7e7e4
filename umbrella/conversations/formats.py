"""Conversion of samples of all accepted formats to v2, which ``Conversation`` holds.

v2: as in docs/data.md. v1: its ancestor, with the modality in the item type (``image_sMRI``). llava: turns of ``from``
and ``value``, with ``<image>`` in the text. chat: ``messages`` of ``role`` and ``content``.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from umbrella.base import UserError, format_name, format_value
from umbrella.conversations.schema import IMAGE_TOKEN

FORMATS = ("v2", "v1", "llava", "chat")
KEYS = {"llava": {"role": "from", "content": "value"}, "chat": {"conversations": "messages"}}
"""Names of v2 keys in other formats."""
ROLES = {"human": "user", "gpt": "assistant"}
PATH_KEYS = ("image_path", "path", "image", "image_url", "url")
SUFFIXES = {
    **dict.fromkeys(("T1w", "T2w", "FLAIR", "PDw", "T2starw", "UNIT1"), "sMRI"),
    **dict.fromkeys(("FA", "MD", "dwi", "ADC"), "dMRI"),
    "bold": "fMRI",
    **dict.fromkeys(("asl", "cbf"), "ASL"),
}
"""BIDS suffix to the modality that it has by default."""
FREESURFER = ("brain", "norm", "T1")
"""Names of FreeSurfer volumes, the preferred one first. Their suffix is T1w."""
WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
"""Beginning of an absolute Windows path: ``D:\\scans``, ``D:/scans`` or ``\\\\server\\scans``."""
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
FILE_MISSING = " does not exist; see `data.root` and `data.path_map`"
"""Message about a file that does not exist, after its path."""

Problems = list[tuple[str, str]]
"""(field, message) pairs."""


class SampleError(ValueError):
    """A sample cannot be used. ``problems`` lists all reasons."""

    def __init__(self, problems: Problems) -> None:
        super().__init__("\n".join(f"{field}: {message}" for field, message in problems))
        self.problems = problems


def detect_format(raw: dict[str, Any]) -> str:
    """Detect the format of a sample, one of ``FORMATS``, from its keys.

    Raises:
        SampleError: the keys match no format.
    """
    if "conversations" in raw:
        turns = _dicts(raw["conversations"])
        if any("from" in turn or "value" in turn for turn in turns) or (not turns and "image" in raw):
            return "llava"
        kinds = [str(item.get("type")) for turn in turns for item in _dicts(turn.get("content"))]
        old = "id" in raw and "task_id" not in raw and "images" not in raw
        return "v1" if old or any(kind.startswith("image_") for kind in kinds) else "v2"
    if "messages" in raw:
        return "chat"
    keys = f"the keys {', '.join(map(format_name, list(raw)[:12]))}" if raw else "no keys"
    known = "v2 and v1 (`conversations` with `role`), llava (`conversations` with `from`), chat (`messages`)"
    raise SampleError([("sample", f"has {keys}, which is no known format; accepted are {known}")])


def rename_keys(raw: dict[str, Any], format: str) -> dict[str, Any]:
    """Return a sample with the keys, roles and items of v2. Malformed values are kept; ``Conversation`` reports them.

    An image item without a path or modality has an empty one, which ``complete`` replaces.
    """
    sample = dict(raw)
    if format == "chat" and "messages" in sample:
        sample["conversations"] = sample.pop("messages")
    if "task_id" not in sample and "id" in sample:
        name = sample.pop("id")
        sample["task_id"] = str(name) if isinstance(name, int) else name
    sample.setdefault("task_type", "")
    turns = sample.get("conversations")
    if isinstance(turns, list):
        split = format == "llava" or (format == "chat" and bool(sample.get("image") or sample.get("images")))
        sample["conversations"] = [
            _rename_turn(turn, KEYS["llava"] if format == "llava" else {}, split) if isinstance(turn, dict) else turn
            for turn in turns
        ]
    return sample


def _rename_turn(turn: dict[str, Any], names: dict[str, str], split: bool) -> dict[str, Any]:
    """Rename the keys, role and items of a turn. ``split``: ``<image>`` in its texts is an image."""
    turn = dict(turn)
    for new, old in names.items():
        if old in turn:
            turn[new] = turn.pop(old)
    if isinstance(turn.get("role"), str):
        turn["role"] = ROLES.get(turn["role"], turn["role"])
    content = turn.get("content", 0)
    if content is None or content == []:
        turn["content"] = ""
    elif isinstance(content, str) and split:
        turn["content"] = _split_at_placeholders(content)
    elif isinstance(content, list):
        turn["content"] = [part for item in content for part in _rename_item(item, split)]
    return turn


def _rename_item(item: Any, split: bool) -> list[Any]:
    if not isinstance(item, dict):
        return [item]
    kind = str(item.get("type"))
    if kind == "text" and split and isinstance(item.get("text"), str):
        return _split_at_placeholders(item["text"])
    if not re.fullmatch("image(_.*)?", kind):
        return [item]
    modality = item.get("modality") or ("" if kind == "image_url" else kind[len("image_") :])
    path = file_path(item)
    image = {key: value for key, value in item.items() if key not in PATH_KEYS}
    return [image | {"type": "image", "modality": modality, "image_path": "" if path is None else path}]


def _split_at_placeholders(text: str) -> list[dict[str, Any]]:
    """Split a text into text and image items, and drop line breaks next to placeholders."""
    items: list[dict[str, Any]] = []
    for i, piece in enumerate(re.split(rf"[\r\n]*{IMAGE_TOKEN}[\r\n]*", text)):
        items += [{"type": "image", "modality": "", "image_path": ""}] if i else []
        items += [{"type": "text", "text": piece}] if piece else []
    return items or [{"type": "text", "text": ""}]


def image_items(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the image items of a well-formed v2 sample in reading order."""
    items = [item for turn in sample["conversations"] for item in _dicts(turn["content"])]
    return [item for item in items if item["type"] == "image"]


def complete(sample: dict[str, Any], format: str) -> Problems:
    """Complete the paths, modalities, task type, labels and loss flags of a well-formed v2 sample, in place.

    Returns:
        What is missing or contradictory.
    """
    items = image_items(sample)
    problems = _assign_files(sample, items, format)
    problems += _assign_modalities(sample, items)
    problems += _apply_loss_mask(sample)
    metadata = sample.get("metadata", {})
    if not sample["task_type"]:
        subjects = sample.get("subject_ids")
        several = {*map(str, subjects if isinstance(subjects, list) else [])}
        several |= {str(metadata[key]) for key in ("subject_id", "reference_id") if metadata.get(key) is not None}
        turns = [turn for turn in sample["conversations"] if turn["role"] != "system"]
        sample["task_type"] = "T1" if len(items) < 2 else "T3" if len(several) > 1 or len(turns) > 2 else "T2"
    if format == "v1":
        sample["metadata"] = _rename_labels(metadata)
    return problems


def _assign_files(sample: dict[str, Any], items: list[dict[str, Any]], format: str) -> Problems:
    """Remove ``images`` (or ``image``) from the sample, and compare it with the image items or complete these."""
    key = "image" if format in KEYS and "image" in sample else "images"
    listed = sample.pop(key, None)
    if listed is None:
        listed = [{}] * len(items)
    entries = listed if isinstance(listed, list) else [listed]
    if len(entries) != len(items):
        noun = f"`{IMAGE_TOKEN}` placeholders" if format == "llava" else "images in the turns"
        counts = f"the number of entries is {len(entries)}, that of {noun} is {len(items)}"
        return [(key, f"{counts}; list each of those once, in their order")]
    problems = []
    for i, (item, entry) in enumerate(zip(items, entries, strict=True)):
        modality = entry.get("modality") if isinstance(entry, dict) else None
        for name, value in (("image_path", file_path(entry)), ("modality", modality)):
            if value is not None and not isinstance(value, str):
                problems.append((f"{key}.{i}", f"must be a text, not {format_value(value)}"))
            elif value and item[name] and value != item[name]:
                message = f"{format_value(value)}, but image {i} of the turns has {format_value(item[name])}"
                problems.append((f"{key}.{i}", f"{message}; they must be the same"))
            else:
                item[name] = item[name] or value or ""
    tokens = [entry.get("token") for entry in _dicts(entries)]
    pattern = "|".join(re.escape(token) for token in tokens if token and isinstance(token, str))
    contents = [turn["content"] for turn in sample["conversations"]]
    texts = [item.get("text", "") for content in contents for item in _dicts(content)]
    texts += [content for content in contents if isinstance(content, str)]
    found = [token for text in texts for token in re.findall(pattern or r"<image(?:_\w+)?>", text)]
    if len(found) not in (0, len(items)):
        counts = f"the number of {found[0]} in the texts is {len(found)}, that of images in the turns is {len(items)}"
        problems.append(("conversations", f"{counts}; there must be one for each"))
    return problems


def _assign_modalities(sample: dict[str, Any], items: list[dict[str, Any]]) -> Problems:
    """Set the modality of each image item that has none, from the sample or else the suffix of the file name."""
    stated = sample.get("modalities") or [sample.get("modality")] * len(items)
    if all(item["modality"] for item in items):
        return []
    if not isinstance(stated, list) or len(stated) != len(items):
        message = f"{format_value(stated)} is not a list of one for each image; the number of images is {len(items)}"
        return [("modalities", message)]
    problems = []
    for item, name in zip(items, stated, strict=True):
        found = item["modality"] or name or modality_by_suffix(item["image_path"])
        if not isinstance(found, str):
            problems.append(("modality", f"must be a text, not {format_value(found)}"))
        elif not found and item["image_path"]:
            file = format_value(re.split(r"[\\/]", item["image_path"])[-1])
            problems.append(("modality", f"cannot be inferred from the file name {file}; add `modality` to the sample"))
        item["modality"] = found
    return problems


def _apply_loss_mask(sample: dict[str, Any]) -> Problems:
    """Combine the flags of ``loss_mask``, one for each turn, with ``loss`` of the turns."""
    mask, turns = sample.pop("loss_mask", None), sample["conversations"]
    if mask is None:
        return []
    if not isinstance(mask, list) or not all(map(is_flag, mask)):
        message = "must be a list of true or false, or 1 or 0, one for each turn, not "
        return [("loss_mask", message + format_value(mask))]
    if len(mask) != len(turns):
        return [("loss_mask", f"has {len(mask)} entries for {len(turns)} turns; write one for each turn")]
    for turn, flag in zip(turns, mask, strict=True):
        turn["loss"] = bool(flag) and turn.get("loss") not in (False, 0)
    return []


def is_flag(value: Any) -> bool:
    """Return whether the value is true, false, 1 or 0."""
    return isinstance(value, bool | int | float) and value in (0, 1)


def _rename_labels(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return v1 metadata, also under the v2 names."""
    metadata = dict(metadata)
    for new, old in (("subject_label", "subject_sex"), ("reference_label", "reference_sex")):
        if old in metadata:
            metadata.setdefault(new, metadata[old])
    if "subject_sex" in metadata and "task" not in metadata:
        metadata.setdefault("target", "sex")
    if metadata.get("comparison_type") in ("same_sex", "different_sex"):
        metadata["comparison_type"] = metadata["comparison_type"].removesuffix("_sex")
    return metadata


def file_path(source: Any) -> Any:
    """Return the path in a string, image item, entry of ``images`` or URL object; None if there is none."""
    if isinstance(source, dict):
        return next((file_path(source[key]) for key in PATH_KEYS if key in source), None)
    if isinstance(source, str) and source.startswith("file://"):
        path = unquote(urlparse(source).path)
        return path[1:] if WINDOWS_PATH.match(path[1:]) else path
    return source


def split_name(file: str) -> tuple[dict[str, str], str]:
    """Split the name of an image into BIDS entities and suffix. Diffusion maps have FA or MD in every naming."""
    folder, name = os.path.split(file)
    *parts, suffix = re.sub(r"(\.[A-Za-z0-9]+)+$", "", name).split("_")
    if suffix in FREESURFER and os.path.basename(folder) == "mri":
        return {"desc": suffix}, "T1w"
    entities = dict(part.split("-", 1) for part in parts if "-" in part and not part.startswith("sub-"))
    if suffix == "dwimap":
        suffix = entities.pop("param", "") or entities.pop("desc", "")
    return entities, suffix.upper() if suffix.upper() in ("FA", "MD") else suffix


def modality_by_suffix(file: str, suffixes: Mapping[str, str] = SUFFIXES) -> str:
    """Return the modality of the BIDS suffix of a file, such as "sMRI" for ``sub-01_T1w.nii.gz``; "" if unknown."""
    return suffixes.get(split_name(file)[1], "")


def absolute_path(path: str, base: Path, path_map: Mapping[str, str]) -> str:
    """Return the absolute path of a volume; addresses and the empty path are returned as they are.

    Args:
        path: as written in the sample.
        base: folder of relative paths.
        path_map: old to new prefix, in whole path components. The longest match is used, before ``base``.
    """
    written = _with_slashes(path)
    for old in sorted(path_map, key=len, reverse=True):
        prefix = _with_slashes(old).rstrip("/")
        if written == prefix or written.startswith(prefix + "/"):
            path = os.path.join(path_map[old], written[len(prefix) :].lstrip("/"))
            break
    if not path.strip() or ADDRESS.match(path) or WINDOWS_PATH.match(path):
        return path.strip()
    return os.path.abspath(os.path.join(base, path))


def _with_slashes(path: str) -> str:
    # In a path with slashes, a backslash belongs to a file name.
    return path.replace("\\", "/") if WINDOWS_PATH.match(path) or "/" not in path else path


def path_error(path: str, on_disk: bool) -> str:
    """Return the problem of a path from ``absolute_path``, or "". ``on_disk``: check that the file exists."""
    if not path:
        return "is empty; write the file's path"
    if ADDRESS.match(path):
        return f"{format_value(path)} is not a file; download it and write the file's path"
    if not on_disk or os.path.isfile(path):
        return ""
    return format_name(path) + (" is a folder; name the image file" if os.path.isdir(path) else FILE_MISSING)


def volume_file(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of a volume.

    Raises:
        UserError: the path is not a file.
    """
    file = absolute_path(os.path.expanduser(path), Path(), {})
    if error := path_error(file, on_disk=True):
        raise UserError(error.split(";")[0])
    return file


def original_field(field: str, format: str) -> str:
    """Return the name of a v2 field in the file, such as ``messages.0.role`` for ``conversations.0.role`` in chat."""
    parts = field.split(".")
    if format == "llava" and "content" in parts:
        parts = parts[: parts.index("content") + 1]  # a value is one text, so the file has no items
    return ".".join(KEYS.get(format, {}).get(part, part) for part in parts)


def _dicts(entries: Any) -> list[dict[str, Any]]:
    """Return the dicts in a list; ignore other values."""
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
