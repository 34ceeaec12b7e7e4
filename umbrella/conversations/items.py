"""Raw turns and items: those of any format as v2 has them."""

import re
from typing import Any

from umbrella.conversations.images import PATH_KEYS, path_in

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
