"""From conversations to what a network can learn: a volume and the label of the person in it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from umbrella.base import UserError
from umbrella.conversations.conversation import Conversation


@dataclass(frozen=True)
class Sample:
    """A volume, and what is true of it."""

    path: str
    subject_id: str
    label: str | float


def targets_of(conversations: Iterable[Conversation]) -> list[str]:
    """The targets that some conversation has a label of, in alphabetical order."""
    return sorted({c.target for c in conversations if c.label is not None})


def own_volume(conversation: Conversation, modality: str) -> str | None:
    """The volume of a modality that the label belongs to: the last one of ``Conversation.asked_volumes``."""
    of_modality = [volume.image_path for volume in conversation.asked_volumes if volume.modality == modality]
    return of_modality[-1] if of_modality else None


def asked(conversations: Iterable[Conversation], target: str, modality: str) -> list[tuple[Conversation, str]]:
    """The conversations about a target that a volume of the modality can answer, each with that volume."""
    about = [c for c in conversations if c.target == target and c.label is not None]
    return [(c, path) for c in about if (path := own_volume(c, modality))]


def samples_of(conversations: Sequence[Conversation], target: str, modality: str) -> list[Sample]:
    """Each volume that is asked about once, in the order of the data.

    Raises:
        UserError: the same volume has two labels.
    """
    first: dict[str, tuple[Conversation, Sample]] = {}
    for conversation, path in asked(conversations, target, modality):
        assert conversation.label is not None
        other, sample = first.setdefault(
            path, (conversation, Sample(path, conversation.subject_id, conversation.label))
        )
        if sample.label != conversation.label:
            raise UserError(
                f"{path}: its {target} is {sample.label!r} in {other.task_id} and {conversation.label!r} in"
                f" {conversation.task_id}; one of them is wrong"
            )
    return [sample for _, sample in first.values()]
