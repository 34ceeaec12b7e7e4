"""Conversations about volumes: the one type that every sample becomes."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from umbrella.conversations.images import disagreements
from umbrella.conversations.items import image_items, images_can_be_counted, objects_in
from umbrella.conversations.values import faulty_values


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
        return [item for turn in self.conversations for item in turn.content if isinstance(item, ImageItem)]

    @property
    def subject_id(self) -> str:
        """Whom the last answer is about; predictions are combined over this."""
        subject = self.metadata.get("subject_id")
        return self.task_id if subject is None else str(subject)

    @property
    def subjects(self) -> set[str]:
        """Everybody who is shown, as far as the sample says: ``subject_ids``, the subject and the reference."""
        others = [self.metadata.get("reference_id"), *((self.model_extra or {}).get("subject_ids") or [])]
        return {self.subject_id, *(str(other) for other in others if other is not None)}

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


def _wrong(what: str, kind: str = "inconsistent") -> PydanticCustomError:
    # The text goes in as a value: as the template, its own braces would be taken for fields.
    return PydanticCustomError(kind, "{what}", {"what": what})
