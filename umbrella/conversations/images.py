"""Image items of samples: conversion of turns, file paths and modalities."""

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlparse

from umbrella.base import UserError
from umbrella.conversations.value_checks import format_name, format_value

IMAGE_TOKEN = "<image>"
"""Placeholder of an image in texts."""
ROLES = {"human": "user", "gpt": "assistant"}
UNKNOWN = "(unknown)"
"""Replaces a path or modality that is reported as missing, so that the other checks can run."""
PATH_KEYS = ("image_path", "path", "image", "image_url", "url")
SUFFIXES = {
    **dict.fromkeys(("T1w", "T2w", "FLAIR"), "sMRI"),
    **dict.fromkeys(("FA", "MD", "dwi", "ADC"), "dMRI"),
    "bold": "fMRI",
}

FILE_MISSING = " does not exist; see `data.root` and `data.path_map`"
"""Message about a file that does not exist, after its path."""
Problems = list[tuple[str, str]]
"""(field, message) pairs."""


def file_path(source: Any) -> Any:
    """Return the path in a string, image item, entry of ``images`` or URL object; None if there is none."""
    if isinstance(source, dict):
        return next((file_path(source[key]) for key in PATH_KEYS if key in source), None)
    if isinstance(source, str) and source.startswith("file://"):
        path = unquote(urlparse(source).path)
        return path[1:] if is_windows_path(path[1:]) else path
    return source


def is_windows_path(path: str) -> bool:
    """Return whether the path is an absolute Windows path: ``D:\\scans``, ``D:/scans`` or ``\\\\server\\scans``."""
    return bool(re.match(r"[A-Za-z]:[\\/]|\\\\", path))


def assign_files(items: list[dict[str, Any]], files: list[Any], key: str, noun: str, complete: bool) -> Problems:
    """Set the file of each image item that has none to the corresponding entry of ``files``.

    Args:
        items: image items in reading order; changed in place.
        files: list of files of the sample; may be empty if every item has a file.
        key: key of this list in the sample.
        noun: name of images in the turns of this format, for messages.
        complete: see ``assign_modalities``.

    Returns:
        The problems.
    """
    problems = []
    for i, file in enumerate(files):
        if not isinstance(file, str):
            expected = "names no file; write the file's path"
            message = expected if file is None else f"must be a text, not {format_value(file)}"
            problems.append((f"{key}.{i}" if len(files) > 1 else key, message))
    if len(files) != len(items) and (files or any("image_path" not in item for item in items)):
        message = f"the number of files is {len(files)}, that of {noun} is {len(items)}; there must be one for each"
        problems += [(key, message)] if complete else []
        files = []
    for item, file in zip(items, files or [UNKNOWN] * len(items), strict=True):
        item.setdefault("image_path", str_or_unknown(file))
    return problems


def assign_modalities(items: list[dict[str, Any]], sample: dict[str, Any], complete: bool) -> Problems:
    """Set the modality of each image item, from the item, the sample or the file suffix, in this order.

    Args:
        items: image items in reading order; changed in place.
        sample: the sample.
        complete: all turns are well formed, so the number of images is known and can be checked.

    Returns:
        The problems.
    """
    problems = []
    stated = sample.get("modalities") or [sample.get("modality")] * len(items)
    if not isinstance(stated, list) or len(stated) != len(items):
        message = f"{format_value(stated)} is not a list of one for each image; the number of images is {len(items)}"
        problems += [("modalities", message)] if complete else []
        stated = [UNKNOWN] * len(items)
    for item, name in zip(items, stated, strict=True):
        file = os.path.basename(str(item["image_path"]))
        found = item.get("modality") or name or modality_by_suffix(file)
        if not found and file not in (UNKNOWN, ""):
            message = f"cannot be inferred from the file name {format_value(file)}; add `modality` to the sample"
            problems.append(("modality", message))
        if found and found is name and not isinstance(name, str):
            key = "modalities" if sample.get("modalities") else "modality"
            problems.append((key, f"must be a text, not {format_value(name)}"))
            found = UNKNOWN
        item["modality"] = found or UNKNOWN
    return problems


def modality_by_suffix(file: str) -> str:
    """Return the modality of a BIDS suffix, such as "sMRI" for ``sub-01_T1w.nii.gz``; "" if it is unknown."""
    suffix = re.search(r"_([A-Za-z0-9]+)(\.[A-Za-z0-9]+)*$", os.path.basename(file))
    return SUFFIXES.get(suffix[1], "") if suffix else ""


def str_or_unknown(value: Any) -> str:
    """Replace a value that is not a string by ``UNKNOWN``; the value is reported elsewhere."""
    return value if isinstance(value, str) else UNKNOWN


def path_error(path: str, as_written: str, on_disk: bool) -> str:
    """Return the problem of a volume path, or "".

    Args:
        path: absolute path, after ``path_map`` and ``root``.
        as_written: path after ``path_map`` only.
        on_disk: check that the file exists.
    """
    if not as_written.strip():
        return "is empty; write the file's path"
    if re.match(r"[a-z][a-z0-9+.-]+://|data:", as_written, re.I):
        return f"{format_value(as_written)} is not a file; download it and write the file's path"
    if not on_disk or os.path.isfile(path):
        return ""
    if os.path.isdir(path):
        return f"{format_name(path)} is a folder; name the image file"
    return format_name(path) + FILE_MISSING


def volume_file(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of a volume.

    Raises:
        UserError: the path is not a file.
    """
    file = os.path.abspath(os.path.expanduser(path))
    if error := path_error(file, str(path), on_disk=True):
        raise UserError(error.split(";")[0])
    return file


def compare_images(items: list[tuple[Any, Any]], listed: list[tuple[Any, Any]]) -> Iterator[tuple[tuple, str]]:
    """Yield (location, message) where the (path, modality) pairs of the turns and of ``images`` differ."""
    if len(items) != len(listed):
        yield (
            ("images",),
            f"the number of entries is {len(listed)}, that of images in the turns is {len(items)};"
            " list each of those once, in their order",
        )
        return
    for i, (item, image) in enumerate(zip(items, listed, strict=True)):
        for field, in_turn, in_list in zip(("path", "modality"), item, image, strict=True):
            # Values that are not strings, and unknown ones, are reported elsewhere.
            comparable = isinstance(in_turn, str) and isinstance(in_list, str) and UNKNOWN not in (in_turn, in_list)
            if comparable and in_turn != in_list:
                message = f"{format_value(in_list)}, but image {i} of the turns has {format_value(in_turn)}"
                yield ("images", i, field), f"{message}; they must be the same"


def dicts_in(raw: Any, key: str) -> list[dict[str, Any]]:
    """Return the dicts in the list ``raw[key]``; ignore other values."""
    entries = raw.get(key) if isinstance(raw, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, (list, tuple)) else []


def image_items(raw: Any) -> list[dict[str, Any]]:
    """Return the image items of a raw v2 sample in reading order; ignore malformed values."""
    items = (item for turn in dicts_in(raw, "conversations") for item in dicts_in(turn, "content"))
    return [item for item in items if item.get("type") == "image"]


def is_well_formed(raw: Any) -> bool:
    """Return whether turns and ``images`` of a raw v2 sample are well formed, so that all images are found."""
    if not isinstance(raw, dict) or not _only_objects(raw.get("images", [])):
        return False
    turns = raw.get("conversations")
    if not turns or not _only_objects(turns):
        return False
    return all(_has_known_items(turn.get("content")) for turn in turns)


def _has_known_items(content: Any) -> bool:
    if isinstance(content, str) or not content or not _only_objects(content):
        return isinstance(content, str)
    return all(item.get("type") in ("text", "image") for item in content)


def _only_objects(entries: Any) -> bool:
    return isinstance(entries, (list, tuple)) and all(isinstance(entry, dict) for entry in entries)


def to_v2_turn(turn: Any, format: str, split: bool) -> Any:
    """Convert a turn of any format to v2. Malformed values are kept; ``Conversation`` reports them.

    Args:
        turn: the turn.
        format: format of the sample.
        split: treat ``<image>`` in texts as an image.
    """
    if not isinstance(turn, dict):
        return turn
    names = {"from": "role", "value": "content"} if format == "llava" else {}
    turn = {names.get(key, key): value for key, value in turn.items()}
    if isinstance(turn.get("role"), str):
        turn["role"] = ROLES.get(turn["role"], turn["role"])
    if "content" in turn and turn["content"] in (None, []):
        turn["content"] = ""
    content = turn.get("content")
    if isinstance(content, str) and split:
        turn["content"] = split_at_placeholders(content)
    elif isinstance(content, list):
        turn["content"] = [part for item in content for part in _v2_items(item, format, split)]
    return turn


def _v2_items(item: Any, format: str, split: bool) -> list[Any]:
    """Convert an item of any format to v2 items; a text with placeholders becomes several."""
    if not isinstance(item, dict):
        return [item]
    kind = str(item.get("type"))
    if kind == "text" and split and isinstance(item.get("text"), str):
        return split_at_placeholders(item["text"])
    if format == "v2" or not re.fullmatch("image(_.*)?", kind):
        return [dict(item)]
    image = {key: value for key, value in item.items() if key not in PATH_KEYS} | {"type": "image"}
    if format == "v1" and kind != "image":
        image.setdefault("modality", kind.removeprefix("image_"))
    path = file_path(item)
    return [image if path is None else image | {"image_path": path}]


def split_at_placeholders(text: str) -> list[dict[str, Any]]:
    """Split a text into text and image items, and drop line breaks next to placeholders."""
    pieces = text.split(IMAGE_TOKEN)
    items: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        if i > 0:
            items.append({"type": "image"})
            piece = piece.lstrip("\r\n")
        if i < len(pieces) - 1:
            piece = piece.rstrip("\r\n")
        if piece or len(pieces) == 1:
            items.append({"type": "text", "text": piece})
    return items
