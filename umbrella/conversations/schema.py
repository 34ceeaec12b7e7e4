"""Conversations about volumes: the one type that every sample becomes."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from umbrella.conversations.fields import LOSS_FLAGS, faulty_values
from umbrella.conversations.images import disagreements, image_items, images_can_be_counted, objects_in

ENTITY = re.compile(r"(?<![A-Za-z0-9])sub-[A-Za-z0-9+-]+(?=[_./\\]|$)")
"""The BIDS entity of the subject in a path."""


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

    @field_validator("content")
    @classmethod
    def _not_empty(cls, content: tuple[Any, ...]) -> tuple[Any, ...]:
        if not content:
            raise _wrong("is empty; write a text, or leave the turn out")
        return content

    @property
    def in_loss(self) -> bool:
        """Whether the training loss may supervise the turn. ``loss: false``, ``weight: 0``, ``train: false`` say no."""
        extra = self.model_extra or {}
        return all(extra.get(flag) is None or bool(extra[flag]) for flag in LOSS_FLAGS)


class Conversation(_Part):
    """One sample: turns of text and volume references, with the truth about the last answer in ``metadata``."""

    task_id: str
    task_type: str
    conversations: tuple[Turn, ...]
    images: tuple[ImageReference, ...] = ()
    metadata: dict[str, Any] = {}

    @field_validator("conversations")
    @classmethod
    def _answered(cls, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if not turns:
            raise _wrong("is empty; a sample needs a user turn and an assistant turn")
        if all(turn.role != "assistant" for turn in turns):
            raise _wrong("no assistant turn, so there is nothing to learn from or to score; add the answer")
        return turns

    @model_validator(mode="wrap")
    @classmethod
    def _agrees(cls, raw: Any, handler: Callable[[Any], "Conversation"]) -> "Conversation":
        # Around the other checks and not after them: a sample with a wrong role still gets its images looked at.
        shown: list[tuple[Any, Any]]
        listed: list[tuple[Any, Any]]
        made, comparable = None, True
        errors: list[InitErrorDetails] = []
        try:
            made = handler(raw)
            shown = [(item.image_path, item.modality) for item in made.volumes]
            listed = [(image.path, image.modality) for image in made.images]
        except ValidationError as error:
            errors = [
                InitErrorDetails(type=_wrong(issue["msg"], issue["type"]), loc=issue["loc"], input=issue["input"])
                for issue in error.errors(include_url=False, include_context=False)
            ]
            shown = [(item.get("image_path"), item.get("modality")) for item in image_items(raw)]
            listed = [(image.get("path"), image.get("modality")) for image in objects_in(raw, "images")]
            # One fault gives one line: what is of another shape may well hold the images that are not found.
            comparable = images_can_be_counted(raw)
        wrong = [*faulty_values(raw), *(disagreements(shown, listed) if comparable else ())]
        for location, what in wrong:
            errors.append(InitErrorDetails(type=_wrong(what), loc=location, input=raw))
        if made is None or errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return made

    @property
    def volumes(self) -> list[ImageItem]:
        """The volumes in reading order."""
        return [item for items in self.volumes_by_turn for item in items]

    @property
    def stated_subject(self) -> str | None:
        """The subject as the sample states it; None where it does not.

        It is the first of ``subject_id`` and ``patient_id``, in ``metadata`` or else beside it, or the only entry of
        ``subject_ids`` that is not the reference.
        """
        extra = self.model_extra or {}
        keys = [(place, key) for place in (self.metadata, extra) for key in ("subject_id", "patient_id")]
        named = [name for place, key in keys if (name := as_name(place.get(key))) is not None]
        others = {as_name(one) for one in extra.get("subject_ids") or []} - {None, self.reference_id}
        return named[0] if named else others.pop() if len(others) == 1 else None

    @property
    def subject_id(self) -> str:
        """Whom the last answer is about; predictions are combined over this."""
        return self.stated_subject or self.task_id

    @property
    def reference_id(self) -> str | None:
        """Whom the subject is compared with, where the sample states it."""
        return as_name(self.metadata.get("reference_id"))

    @property
    def family_id(self) -> str | None:
        """The group of subjects that must stay in one split, such as a family, where the sample states it."""
        return as_name(self.metadata.get("family_id", (self.model_extra or {}).get("family_id")))

    @property
    def subjects(self) -> set[str]:
        """Everybody who is shown, as far as the sample says: ``subject_ids``, the subject and the reference."""
        others = map(as_name, (self.model_extra or {}).get("subject_ids") or [])
        return {self.subject_id, *(other for other in (self.reference_id, *others) if other is not None)}

    @property
    def subject_volumes(self) -> list[ImageItem]:
        """The volumes that the last answer is about: all of them, unless a reference is shown too.

        Then they are those whose path names the subject. Without such a path they are the volumes of the last turn
        that shows any, where earlier turns show others, or else the last volume.
        """
        if len(self.subjects) == 1:
            return self.volumes
        own = [volume for volume in self.volumes if entity(volume.image_path) == self.subject_id]
        shown = self.volumes_by_turn
        return own or (shown[-1] if len(shown) > 1 else self.volumes[-1:])

    @property
    def volumes_by_turn(self) -> list[list[ImageItem]]:
        """The volumes of each turn that shows any."""
        shown = [[item for item in turn.content if isinstance(item, ImageItem)] for turn in self.conversations]
        return [volumes for volumes in shown if volumes]

    @property
    def label(self) -> str | float | None:
        """The truth for the last answer: a class name, a number, or None where there is none."""
        return self.metadata.get("subject_label")

    @property
    def target(self) -> str:
        """What the label is a value of ("sex"): ``metadata.target``, else ``metadata.task``, else the task type."""
        return str(self.metadata.get("target") or self.metadata.get("task") or self.task_type)

    @property
    def last_answer(self) -> int:
        """Index of the last assistant turn."""
        return max(i for i, turn in enumerate(self.conversations) if turn.role == "assistant")

    @property
    def answer(self) -> str:
        """The text of the last assistant turn."""
        last = self.conversations[self.last_answer]
        return "\n".join(item.text for item in last.content if isinstance(item, TextItem))

    @property
    def is_answered(self) -> bool:
        """Whether the last assistant turn has something other than blanks."""
        last = self.conversations[self.last_answer]
        return any(isinstance(item, ImageItem) or item.text.strip() for item in last.content)

    def with_answer(self, text: str) -> "Conversation":
        """The same sample with another text as its last assistant turn."""
        turns, last = list(self.conversations), self.last_answer
        turns[last] = turns[last].model_copy(update={"content": (TextItem(type="text", text=text),)})
        return self.model_copy(update={"conversations": tuple(turns)})

    def with_paths(self, rewrite: Callable[[str], str]) -> "Conversation":
        """The same sample with every volume path, in turns and ``images``, as ``rewrite`` gives it.

        Raises:
            ValueError: further keys are nested deeper than pydantic writes them out as JSON (about 250 levels).
        """
        raw = self.model_dump(mode="json")
        for item in image_items(raw):
            item["image_path"] = rewrite(item["image_path"])
        for image in raw["images"]:
            image["path"] = rewrite(image["path"])
        return Conversation.model_validate(raw)


def as_name(value: Any) -> str | None:
    """An identifier as text: without blanks around it, and 7.0 as "7". None stays None."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else str(value).strip()


def entity(path: str) -> str | None:
    """The last ``sub-...`` in a path, which by BIDS names the subject; None without one."""
    found = ENTITY.findall(path)
    return found[-1] if found else None


def most_frequent_answers(conversations: Iterable[Conversation]) -> dict[str, dict[str | float, str]]:
    """Target to label to the text that most often answers it; of texts that are equally frequent, the first."""
    answers: dict[str, dict[str | float, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for conversation in conversations:
        if conversation.label is not None:
            answers[conversation.target][conversation.label][conversation.answer] += 1
    return {
        target: {label: texts.most_common(1)[0][0] for label, texts in by_label.items()}
        for target, by_label in answers.items()
    }


def _wrong(what: str, kind: str = "inconsistent") -> PydanticCustomError:
    # The text goes in as a value: as the template, its own braces would be taken for fields.
    return PydanticCustomError(kind, "{what}", {"what": what})
