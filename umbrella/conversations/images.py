"""The file and the modality of each image of a sample, from wherever its format has them."""

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlparse

from umbrella.base import UserError
from umbrella.conversations.fields import plain, show

UNKNOWN = "(unknown)"
"""Stands for a path or modality that could not be told, once that is reported, so that the other checks still run."""
PATH_KEYS = ("image_path", "path", "image", "image_url", "url")
SUFFIXES = {
    **dict.fromkeys(("T1w", "T2w", "FLAIR"), "sMRI"),
    **dict.fromkeys(("FA", "MD", "dwi", "ADC"), "dMRI"),
    "bold": "fMRI",
}

MISSING = " does not exist; see `data.root` and `data.path_map`"
"""What is said of a path that leads nowhere, after the path."""
Problems = list[tuple[str, str]]
"""(field, what is wrong; the remedy)."""


def path_in(named: Any) -> Any:
    """The file that an image item, an entry of ``images`` or a URL object names; None without one."""
    if isinstance(named, dict):
        return next((path_in(named[key]) for key in PATH_KEYS if key in named), None)
    if isinstance(named, str) and named.startswith("file://"):
        path = unquote(urlparse(named).path)
        return path[1:] if is_windows(path[1:]) else path
    return named


def is_windows(path: str) -> bool:
    """Whether the path is absolute on Windows: ``D:\\scans``, ``D:/scans`` or ``\\\\server\\scans``."""
    return bool(re.match(r"[A-Za-z]:[\\/]|\\\\", path))


def name_files(shown: list[dict[str, Any]], files: list[Any], key: str, what_shows: str, whole: bool) -> Problems:
    """Give each image item that names no file the one at its place in ``files``; returns what stands against that.

    Args:
        shown: the image items in reading order; changed in place.
        files: the sample's own list, which may be empty where every item names its file.
        key: the name of that list in the sample.
        what_shows: what an image is called in the turns of this format.
        whole: as in ``tell_modalities``.
    """
    problems = []
    for i, file in enumerate(files):
        if not isinstance(file, str):
            what = "names no file; write the file's path" if file is None else f"must be a text, not {show(file)}"
            problems.append((f"{key}.{i}" if len(files) > 1 else key, what))
    if len(files) != len(shown) and (files or any("image_path" not in item for item in shown)):
        what = f"the number of files is {len(files)}, that of {what_shows} is {len(shown)}; there must be one for each"
        problems += [(key, what)] if whole else []
        files = []
    for item, file in zip(shown, files or [UNKNOWN] * len(shown), strict=True):
        item.setdefault("image_path", text_or_unknown(file))
    return problems


def tell_modalities(shown: list[dict[str, Any]], sample: dict[str, Any], modality: str, whole: bool) -> Problems:
    """Give each image item its modality, from the item, the sample, the caller or the file's suffix, in this order.

    Args:
        whole: every turn could be looked into. Otherwise no numbers are compared: that of images is not known.
    """
    problems = []
    stated = sample.get("modalities") or [sample.get("modality") or modality] * len(shown)
    if not isinstance(stated, list) or len(stated) != len(shown):
        what = f"{show(stated)} is not a list of one for each image; the number of images is {len(shown)}"
        problems += [("modalities", what)] if whole else []
        stated = [UNKNOWN] * len(shown)
    for item, name in zip(shown, stated, strict=True):
        file = os.path.basename(str(item["image_path"]))
        told = item.get("modality") or name or modality_by_suffix(file)
        if not told and file not in (UNKNOWN, ""):
            what = f"cannot be told from the file name {show(file)}; add `modality` to the sample"
            problems.append(("modality", what))
        if told and told is name and not isinstance(name, str):
            key = "modalities" if sample.get("modalities") else "modality"
            problems.append((key, f"must be a text, not {show(name)}"))
            told = UNKNOWN
        item["modality"] = told or UNKNOWN
    return problems


def modality_by_suffix(file: str) -> str:
    """The modality of a file's BIDS suffix: "sMRI" for ``sub-01_T1w.nii.gz``; empty where the suffix is not known."""
    suffix = re.search(r"_([A-Za-z0-9]+)(\.[A-Za-z0-9]+)*$", os.path.basename(file))
    return SUFFIXES.get(suffix[1], "") if suffix else ""


def text_or_unknown(value: Any) -> str:
    """What is no text is reported where it was written, and not again where it was copied to."""
    return value if isinstance(value, str) else UNKNOWN


def fault_of_path(path: str, as_written: str, on_disk: bool) -> str:
    """What is wrong with a volume's path; empty when nothing is.

    Args:
        path: where it leads, after ``path_map`` and ``root``.
        as_written: after ``path_map`` alone.
        on_disk: look whether the file exists.
    """
    if not as_written.strip():
        return "is empty; write the file's path"
    if re.match(r"[a-z][a-z0-9+.-]+://|data:", as_written, re.I):
        return f"{show(as_written)} is not a file; download it and write the file's path"
    if not on_disk or os.path.isfile(path):
        return ""
    if os.path.isdir(path):
        return f"{plain(path)} is a folder; name the image file"
    return plain(path) + MISSING


def volume_file(path: str | os.PathLike[str]) -> str:
    """The absolute path of a volume that a person has named.

    Raises:
        UserError: it is no file.
    """
    file = os.path.abspath(os.path.expanduser(path))
    if fault := fault_of_path(file, str(path), on_disk=True):
        raise UserError(fault.split(";")[0])
    return file


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
            # What is no text, and what could not be told, is reported as such.
            comparable = isinstance(in_turn, str) and isinstance(in_list, str) and UNKNOWN not in (in_turn, in_list)
            if comparable and in_turn != in_list:
                what = f"{show(in_list)}, but image {i} of the turns has {show(in_turn)}; they must be the same"
                yield ("images", i, field), what


ROLES = {"human": "user", "gpt": "assistant"}
TOKEN = "<image>"


def objects_in(raw: Any, key: str) -> list[dict[str, Any]]:
    """The objects of the list ``raw[key]``; whatever is not of that shape is passed over."""
    entries = raw.get(key) if isinstance(raw, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, (list, tuple)) else []


def image_items(raw: Any) -> list[dict[str, Any]]:
    """The image items of a raw v2 sample in reading order; whatever is not of that shape is passed over."""
    items = (item for turn in objects_in(raw, "conversations") for item in objects_in(turn, "content"))
    return [item for item in items if item.get("type") == "image"]


def images_can_be_counted(raw: Any) -> bool:
    """Whether turns and ``images`` of a raw v2 sample are of their shape, so that no image can have been overlooked."""
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
    if "content" in turn and turn["content"] in (None, []):
        turn["content"] = ""
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
        if piece or len(pieces) == 1:
            items.append({"type": "text", "text": piece})
    return items
