"""Conversations about volumes: the one type that every file becomes, and the reading of files with all their problems.

The format is described in docs/data.md. References only: no voxel is read here.
"""

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from umbrella.base import UserError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class TextItem(_Part):
    """Words."""

    type: Literal["text"]
    text: str


class ImageItem(_Part):
    """A volume, referred to by its file."""

    type: Literal["image"]
    modality: str
    image_path: str


class ImageReference(_Part):
    """One entry of the sample's ``images`` list."""

    path: str
    modality: str


class Turn(_Part):
    """One message. Plain text content becomes one text item."""

    role: Literal["system", "user", "assistant"]
    content: tuple[Annotated[TextItem | ImageItem, Field(discriminator="type")], ...]

    @field_validator("content", mode="before")
    @classmethod
    def _plain_text(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Conversation(_Part):
    """One sample: turns of text and volume references, with the truth about the last answer in ``metadata``."""

    task_id: str
    task_type: str
    conversations: tuple[Turn, ...]
    images: tuple[ImageReference, ...] = ()
    metadata: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "Conversation":
        shown = [(item.image_path, item.modality) for item in self.volumes]
        if shown != [(image.path, image.modality) for image in self.images]:
            raise ValueError(
                f"images lists {len(self.images)} volumes and the turns show {len(shown)}, or they differ in path,"
                " modality or order; the i-th image item and images[i] must name the same file"
            )
        if all(turn.role != "assistant" for turn in self.conversations):
            raise ValueError("no assistant turn: there is nothing to learn from or to score")
        return self

    @property
    def volumes(self) -> list[ImageItem]:
        """The volumes in reading order."""
        return [item for turn in self.conversations for item in turn.content if isinstance(item, ImageItem)]

    @property
    def subject_id(self) -> str:
        """Whom the last answer is about; predictions are combined over this."""
        return str(self.metadata.get("subject_id", self.task_id))

    @property
    def label(self) -> str | float | None:
        """The truth for the last answer: a class name, a number, or None where there is none."""
        return self.metadata.get("subject_label")

    @property
    def target(self) -> str:
        """What the label is a value of ("sex"): ``metadata.target``, else ``metadata.task``, else the task type."""
        return str(self.metadata.get("target") or self.metadata.get("task") or self.task_type)

    @property
    def answer(self) -> str:
        """The text of the last assistant turn."""
        last = [turn for turn in self.conversations if turn.role == "assistant"][-1]
        return "\n".join(item.text for item in last.content if isinstance(item, TextItem))

    def with_root(self, root: Path) -> "Conversation":
        """The same sample with relative volume paths made absolute against ``root``."""
        raw = self.model_dump()
        items = (item for turn in raw["conversations"] for item in turn["content"] if item["type"] == "image")
        for item in items:
            item["image_path"] = os.path.abspath(root / item["image_path"])
        for image in raw["images"]:
            image["path"] = os.path.abspath(root / image["path"])
        return Conversation.model_validate(raw)


def conversation_files(path: Path) -> list[Path]:
    """The files behind a path: itself, or every ``.json`` and ``.jsonl`` below a folder, sorted."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".jsonl"))
        if not files:
            raise UserError(f"{path}: no .json or .jsonl file in this folder")
        return files
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; name a conversation file (.json, .jsonl) or a folder of them")
    return [path]


def read_conversations(
    path: str | Path, root: str | Path | None = None, modalities: Collection[str] | None = None
) -> list[Conversation]:
    """Read every conversation of a file or folder, volume paths made absolute.

    Args:
        path: a JSON object, a JSON list, JSON Lines, or a folder of such files.
        root: what relative volume paths are relative to; the conversation file's own folder when None.
        modalities: the modality names that the settings know; None accepts all.

    Raises:
        UserError: with every problem found, one line each: ``file:line: field: what is wrong``.
    """
    samples: list[Conversation] = []
    problems: list[str] = []
    first_seen: dict[str, str] = {}
    for file in conversation_files(Path(path)):
        base = Path(root) if root else file.parent
        for line, raw in _objects(file, problems):
            where = f"{file}:{line}"
            try:
                sample = Conversation.model_validate(raw).with_root(base)
            except ValidationError as error:
                problems += [f"{where}: {_field(issue['loc'])}: {issue['msg']}" for issue in error.errors()]
                continue
            if sample.task_id in first_seen:
                problems.append(f"{where}: task_id: {sample.task_id} is already used at {first_seen[sample.task_id]}")
            first_seen.setdefault(sample.task_id, where)
            for item in sample.volumes:
                if modalities is not None and item.modality not in modalities:
                    known = ", ".join(modalities)
                    problems.append(f"{where}: modality: {item.modality!r} is not one of {known}; see `modalities`")
                if not Path(item.image_path).is_file():
                    problems.append(f"{where}: image_path: {item.image_path} does not exist; see `data.root`")
            samples.append(sample)
    if problems:
        raise UserError("\n".join(problems))
    if not samples:
        raise UserError(f"{path}: holds no conversation")
    return samples


def _objects(file: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """Each top-level object of a JSON object, list or JSON Lines file, with the line it starts on."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{file}: cannot be read as UTF-8 text: {error}")
        return
    decoder = json.JSONDecoder()
    is_list = text.lstrip().startswith("[")
    if is_list and not text.rstrip().endswith("]"):
        problems.append(f"{file}: not JSON: the list is not closed, so the file is probably cut short")
        return
    separators = " \t\r\n,[]" if is_list else " \t\r\n"
    position = line = 0
    while True:
        start = position
        while position < len(text) and text[position] in separators:
            position += 1
        line += text.count("\n", start, position)
        if position == len(text):
            return
        try:
            raw, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            problems.append(f"{file}:{error.lineno}: not JSON: {error.msg}, column {error.colno}")
            return
        yield line + 1, raw
        line += text.count("\n", position, end)
        position = end


def _field(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "sample"
