"""Raw turns and items: those of any format as v2 has them, and the file and modality of each image."""

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlparse

ROLES = {"human": "user", "gpt": "assistant"}
TOKEN = "<image>"
UNKNOWN = "(unknown)"
"""Stands for a path or modality that could not be told, once that is reported, so that the other checks still run."""
PATH_KEYS = ("image_path", "path", "image", "image_url", "url")
SUFFIXES = {
    **dict.fromkeys(("T1w", "T2w", "FLAIR"), "sMRI"),
    **dict.fromkeys(("FA", "MD", "dwi", "ADC"), "dMRI"),
    "bold": "fMRI",
}

Problems = list[tuple[str, str]]
"""(field, what is wrong; the remedy)."""


def objects_in(raw: Any, key: str) -> list[dict[str, Any]]:
    """The objects of the list ``raw[key]``; whatever is not of that shape is passed over."""
    entries = raw.get(key) if isinstance(raw, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, (list, tuple)) else []


def image_items(raw: Any) -> list[dict[str, Any]]:
    """The image items of a raw v2 sample in reading order; whatever is not of that shape is passed over."""
    items = (item for turn in objects_in(raw, "conversations") for item in objects_in(turn, "content"))
    return [item for item in items if item.get("type") == "image"]


def v2_turn(turn: Any, format: str, cut: bool) -> Any:
    """A turn of any format as one of v2; ``cut`` says that ``<image>`` in its texts stands for an image.

    Whatever is not of the format is left as it is, for ``Conversation`` to find.
    """
    if not isinstance(turn, dict):
        return turn
    names = {"from": "role", "value": "content"} if format == "llava" else {}
    turn = {names.get(key, key): value for key, value in turn.items()}
    if isinstance(turn.get("role"), str):
        turn["role"] = ROLES.get(turn["role"], turn["role"])
    content = turn.get("content")
    if isinstance(content, str) and cut:
        turn["content"] = cut_text(content)
    elif isinstance(content, list):
        turn["content"] = [part for item in content for part in _v2_items(item, format, cut)]
    return turn


def _v2_items(item: Any, format: str, cut: bool) -> list[Any]:
    """An item of any format as items of v2: more than one where a text is cut at placeholders."""
    if not isinstance(item, dict):
        return [item]
    kind = str(item.get("type"))
    if kind == "text" and cut and isinstance(item.get("text"), str):
        return cut_text(item["text"])
    if format == "v2" or not re.fullmatch("image(_.*)?", kind):
        return [dict(item)]
    image = {key: value for key, value in item.items() if key not in PATH_KEYS} | {"type": "image"}
    if format == "v1" and kind != "image":
        image.setdefault("modality", kind.removeprefix("image_"))
    path = path_in(item)
    return [image if path is None else image | {"image_path": path}]


def cut_text(text: str) -> list[dict[str, Any]]:
    """Text and image items of a text with placeholders; line breaks that only set a placeholder apart go."""
    pieces = text.split(TOKEN)
    items: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        if i > 0:
            items.append({"type": "image"})
            piece = piece.lstrip("\r\n")
        if i < len(pieces) - 1:
            piece = piece.rstrip("\r\n")
        if piece:
            items.append({"type": "text", "text": piece})
    return items


def path_in(named: Any) -> Any:
    """The file that an image item, an entry of ``images`` or a URL object names; None without one."""
    if isinstance(named, dict):
        return next((path_in(named[key]) for key in PATH_KEYS if key in named), None)
    if isinstance(named, str) and named.startswith("file://"):
        return unquote(urlparse(named).path)
    return named


def name_files(shown: list[dict[str, Any]], files: list[Any], key: str, what_shows: str) -> Problems:
    """Give each image item that names no file the one at its place in ``files``; returns what stands against that.

    Args:
        shown: the image items in reading order; changed in place.
        files: the sample's own list, which may be empty where every item names its file.
        key: the name of that list in the sample.
        what_shows: what an image is called in the turns of this format.
    """
    problems = []
    if len(files) != len(shown) and (files or any("image_path" not in item for item in shown)):
        what = f"the number of files is {len(files)}, that of {what_shows} is {len(shown)}; there must be one for each"
        problems.append((key, what))
        files = []
    for item, file in zip(shown, files or [UNKNOWN] * len(shown), strict=True):
        path = item.setdefault("image_path", file)
        if isinstance(path, str) and re.match(r"(https?|s3|gs|data):", path):
            problems.append(("image_path", f"{path[:40]!r} is not a file; download it and write the file's path"))
            item["image_path"] = UNKNOWN
    return problems


def tell_modalities(shown: list[dict[str, Any]], sample: dict[str, Any], modality: str) -> Problems:
    """Give each image item its modality, from the item, the sample, the caller or the file's suffix, in this order."""
    problems = []
    stated = sample.get("modalities") or [sample.get("modality") or modality] * len(shown)
    if not isinstance(stated, list) or len(stated) != len(shown):
        problems.append(
            ("modalities", f"{stated!r} is not a list of one for each image; the number of images is {len(shown)}")
        )
        stated = [UNKNOWN] * len(shown)
    for item, name in zip(shown, stated, strict=True):
        file = os.path.basename(str(item["image_path"]))
        suffix = re.search(r"_([A-Za-z0-9]+)(\.[A-Za-z0-9]+)*$", file)
        told = item.get("modality") or name or SUFFIXES.get(suffix[1] if suffix else "")
        if not told and file != UNKNOWN:
            what = f"cannot be told from the file name {file!r}; add `modality` to the sample"
            problems.append(("modality", what))
        item["modality"] = told or UNKNOWN
    return problems


def disagreements(shown: list[tuple[Any, Any]], listed: list[tuple[Any, Any]]) -> Iterator[tuple[tuple, str]]:
    """(location, what is wrong) where (path, modality) of the turns and of ``images`` differ."""
    if len(shown) != len(listed):
        yield (
            ("images",),
            f"the number of entries is {len(listed)}, that of images in the turns is {len(shown)};"
            " list each of those once, in their order",
        )
        return
    for i, (item, image) in enumerate(zip(shown, listed, strict=True)):
        for field, in_turn, in_list in zip(("path", "modality"), item, image, strict=True):
            # What is no text is reported as such.
            if in_turn != in_list and isinstance(in_turn, str) and isinstance(in_list, str):
                yield (
                    ("images", i, field),
                    f"{in_list!r}, but image {i} of the turns has {in_turn!r}; they must be the same",
                )
