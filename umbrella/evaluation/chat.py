"""A conversation with a model that goes on, and the turns that it is made of."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbrella.conversations.conversation import Conversation, ImageItem, TextItem, Turn

if TYPE_CHECKING:
    from umbrella.evaluation.answering import Umbrella

Paths = str | Path | Sequence[str | Path]
"""One file, or several in the order in which they are shown."""
Modalities = str | Sequence[str] | None
"""The modality of all volumes, or one name for each; None where they can be told by their names or axes."""


class Chat:
    """A conversation that goes on: each question is asked with all that was said before."""

    def __init__(self, model: "Umbrella", system: str = "") -> None:
        self.turns = [Turn(role="system", content=(TextItem(type="text", text=system),))] if system else []
        """What was said so far."""
        self._model = model

    def ask(
        self,
        question: str,
        volumes: Paths = (),
        modality: Modalities = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> str:
        """The answer's text. Volumes, if any, stand before the question; a question that fails was not asked.

        Raises:
            UserError: as ``Umbrella.answer`` and ``Umbrella.items``.
        """
        turns = [*self.turns, user_turn(self._model.items(volumes, modality), question)]
        asked = as_conversation([*turns, assistant_turn("")])
        (answer,) = self._model.answer([asked], max_new_tokens, **options)
        self.turns = [*turns, assistant_turn(answer)]
        return answer


def user_turn(volumes: Sequence[ImageItem], question: str) -> Turn:
    """Volumes, and then a question about them."""
    return Turn(role="user", content=(*volumes, TextItem(type="text", text=question)))


def assistant_turn(text: str) -> Turn:
    """An answer."""
    return Turn(role="assistant", content=(TextItem(type="text", text=text),))


def as_conversation(turns: Sequence[Turn], **metadata: Any) -> Conversation:
    """Turns as a sample without a name."""
    volumes = [item for turn in turns for item in turn.content if isinstance(item, ImageItem)]
    images = tuple({"path": volume.image_path, "modality": volume.modality} for volume in volumes)
    sample = {"task_id": "question", "task_type": "question", "conversations": tuple(turns), "images": images}
    return Conversation.model_validate(sample | {"metadata": metadata})
