"""The type ``Conversation``, to which samples of all formats are converted."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

IMAGE_TOKEN = "<image>"
"""Placeholder of an image in texts."""
LOSS_FLAGS = ("loss", "weight", "train")
"""Keys of a turn that exclude it from the training loss if they are false or 0."""
SPLITS = ("train", "validation", "test")
"""Splits of a cohort."""
FAMILY = "family_id"
"""Key of metadata that groups subjects, unless another one is named: a group must be in one split."""
QUESTION_OF = "question_of"
"""Key of a conversation that ``Conversation.questions`` made."""
PARAPHRASE = "paraphrase"
"""Key of a text item: the same question in another wording."""
BLANK = "blank:"
"""Prefix of the path of a volume whose voxels are all replaced by one value."""
CONTROL = "control"
"""Key of a conversation of a control: an answer is generated only where none is scored by likelihood."""
ENTITY = re.compile(r"(?<![A-Za-z0-9])sub-[A-Za-z0-9+-]+(?=[_./\\]|$)")
"""BIDS subject entity in a path."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class TextItem(_Part):
    """A text."""

    type: Literal["text"]
    text: str


class ImageItem(_Part):
    """A reference to a volume file."""

    type: Literal["image"]
    modality: str
    image_path: str


class Turn(_Part):
    """One message. A string as content becomes one text item."""

    role: Literal["system", "user", "assistant"]
    content: tuple[Annotated[TextItem | ImageItem, Field(discriminator="type")], ...]

    @field_validator("content", mode="before")
    @classmethod
    def _text_to_items(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def text(self) -> str:
        """The texts of the turn, without its volumes."""
        return "\n".join(item.text for item in self.content if isinstance(item, TextItem))

    @property
    def in_loss(self) -> bool:
        """Whether the training loss may include the turn: no ``loss: false``, ``weight: 0`` or ``train: false``."""
        extra = self.model_extra or {}
        return all(extra.get(flag) is None or bool(extra[flag]) for flag in LOSS_FLAGS)


class Conversation(_Part):
    """One sample: turns with texts and volume references. ``metadata`` has the label of the last answer, or several."""

    task_id: str
    task_type: str
    conversations: tuple[Turn, ...]
    metadata: dict[str, Any] = {}

    @field_validator("conversations")
    @classmethod
    def _check_answer(cls, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if all(turn.role != "assistant" for turn in turns):
            message = "no assistant turn, so there is nothing to learn from or to score; add the answer"
            raise PydanticCustomError("no_answer", message)
        return turns

    @property
    def volumes(self) -> list[ImageItem]:
        """The volumes in reading order."""
        return [item for items in self.volumes_by_turn for item in items]

    @property
    def stated_subject(self) -> str | None:
        """The subject that the sample states, or None.

        This is ``subject_id`` or ``patient_id``, in ``metadata`` or at the top level, or else the only entry of
        ``subject_ids`` that is not the reference.
        """
        extra = self.model_extra or {}
        keys = [(place, key) for place in (self.metadata, extra) for key in ("subject_id", "patient_id")]
        named = [name for place, key in keys if (name := normalise_id(place.get(key))) is not None]
        others = {normalise_id(one) for one in extra.get("subject_ids") or []} - {None, self.reference_id}
        return named[0] if named else others.pop() if len(others) == 1 else None

    @property
    def subject_id(self) -> str:
        """The subject of the last answer, over which predictions are aggregated; ``task_id`` if none is stated."""
        return self.stated_subject or self.task_id

    @property
    def reference_id(self) -> str | None:
        """The reference subject of a comparison, or None."""
        return normalise_id(self.metadata.get("reference_id"))

    def group(self, key: str) -> str | None:
        """The group of subjects that must stay in one split: the value of a key such as family_id, or None."""
        return normalise_id(self.metadata.get(key, (self.model_extra or {}).get(key))) or None

    @property
    def subjects(self) -> set[str]:
        """All subjects that the sample states: the subject, the reference and ``subject_ids``."""
        others = map(normalise_id, (self.model_extra or {}).get("subject_ids") or [])
        return {self.subject_id, *(other for other in (self.reference_id, *others) if other is not None)}

    @property
    def subject_volumes(self) -> list[ImageItem]:
        """The volumes of the subject of the last answer: all volumes, unless there are several subjects.

        With several subjects, these are the volumes whose path names the subject. Without such a path, they are those
        of the last turn with volumes, or the last volume if only one turn has volumes.
        """
        if len(self.subjects) == 1:
            return self.volumes
        named = [volume for volume in self.volumes if bids_subject(volume.image_path) == self.subject_id]
        by_turn = self.volumes_by_turn
        return named or (by_turn[-1] if len(by_turn) > 1 else self.volumes[-1:])

    @property
    def volumes_by_turn(self) -> list[list[ImageItem]]:
        """The volumes of each turn that has any."""
        shown = [[item for item in turn.content if isinstance(item, ImageItem)] for turn in self.conversations]
        return [volumes for volumes in shown if volumes]

    @property
    def label(self) -> str | float | None:
        """The label of the last answer: a class name, a number, or None."""
        return self.metadata.get("subject_label")

    @property
    def target(self) -> str:
        """The variable of the label, such as "sex": ``metadata.target``, ``metadata.task`` or the task type."""
        return str(self.metadata.get("target") or self.metadata.get("task") or self.task_type)

    @property
    def candidates(self) -> dict[str, str]:
        """The answers that are possible for this sample, label to text; empty if it has none of its own."""
        return read_candidates(self.metadata)

    @property
    def conversation_id(self) -> str:
        """The ``task_id`` of the sample that this is one of the ``questions`` of; its own if it is none."""
        return (self.model_extra or {}).get(QUESTION_OF, self.task_id)

    def questions(self) -> list["Conversation"]:
        """Return a conversation with one label for each entry of ``metadata.labels``; without entries, the sample.

        Such a conversation ends with the turn of its label. Its ``task_id`` is ``<task_id>:<turn>:<target>``. A
        ``subject_label`` that is not among the entries has one of its own.
        """
        entries = self.metadata.get("labels")
        if not entries or self.conversation_id != self.task_id:
            return [self]
        last = {"turn": self.last_answer, "target": self.target, "label": self.label}
        if self.label is not None and all(entry | last != entry for entry in entries):
            entries = [*entries, last]
        return [self._question(entry, entries) for entry in sorted(entries, key=lambda entry: entry["turn"])]

    def _question(self, entry: dict[str, Any], entries: list[dict[str, Any]]) -> "Conversation":
        turn, target = entry["turn"], entry["target"]
        own = entry.get("candidates")
        if (turn, target) == (self.last_answer, self.target):
            own = own or self.candidates
        metadata = {key: value for key, value in self.metadata.items() if key != "candidates"}
        metadata |= {"candidates": own} if own else {}
        changes = {
            "task_id": f"{self.task_id}:{turn}:{target}",
            "conversations": self.conversations[: turn + 1],
            "metadata": metadata | {"labels": entries, "target": target, "subject_label": entry["label"]},
            QUESTION_OF: self.task_id,
        }
        return self.model_copy(update=changes)

    @property
    def asked_before(self) -> list[int]:
        """The indices of the earlier turns with a label, in a conversation that ``questions`` made."""
        if self.conversation_id == self.task_id:
            return []
        return sorted({entry["turn"] for entry in self.metadata["labels"] if entry["turn"] < self.last_answer})

    @property
    def last_answer(self) -> int:
        """Index of the last assistant turn."""
        return max(i for i, turn in enumerate(self.conversations) if turn.role == "assistant")

    @property
    def answer(self) -> str:
        """The text of the last assistant turn."""
        return self.conversations[self.last_answer].text

    @property
    def is_answered(self) -> bool:
        """Whether the last assistant turn has an image or a text that is not blank."""
        last = self.conversations[self.last_answer]
        return any(isinstance(item, ImageItem) or item.text.strip() for item in last.content)

    def with_answer(self, text: str, turn: int | None = None) -> "Conversation":
        """Return the sample with another text as an assistant turn; None: the last one."""
        turns, i = list(self.conversations), self.last_answer if turn is None else turn
        turns[i] = turns[i].model_copy(update={"content": (TextItem(type="text", text=text),)})
        return self.model_copy(update={"conversations": tuple(turns)})

    def with_paths(self, rewrite: Callable[[str], str]) -> "Conversation":
        """Return the sample with ``rewrite`` applied to every volume path."""
        raw = self.model_dump(mode="json")
        for turn in raw["conversations"]:
            for item in turn["content"]:
                if item["type"] == "image":
                    item["image_path"] = rewrite(item["image_path"])
        return Conversation.model_validate(raw)


def questions_of(conversations: Iterable[Conversation]) -> list[Conversation]:
    """Return the ``questions`` of all conversations, in order."""
    return [question for conversation in conversations for question in conversation.questions()]


def read_candidates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the ``candidates`` of metadata as label to text; in a list, each text is its own label."""
    found = metadata.get("candidates") or {}
    return dict(found) if isinstance(found, Mapping) else {text: text for text in found}


def normalise_id(value: Any) -> str | None:
    """Convert an identifier to text without surrounding blanks, and 7.0 to "7"; None stays None."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else str(value).strip()


def bids_subject(path: str) -> str | None:
    """Return the last BIDS subject entity (``sub-...``) in a path, or None."""
    found = ENTITY.findall(path)
    return found[-1] if found else None


def most_frequent_answers(conversations: Iterable[Conversation]) -> dict[str, dict[str | float, str]]:
    """Return target to label to its most frequent answer; of equally frequent answers, the first."""
    answers: dict[str, dict[str | float, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for conversation in questions_of(conversations):
        if conversation.label is not None:
            answers[conversation.target][conversation.label][conversation.answer] += 1
    return {
        target: {label: texts.most_common(1)[0][0] for label, texts in by_label.items()}
        for target, by_label in answers.items()
    }
