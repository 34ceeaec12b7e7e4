"""Text to tokens: a conversation through the tokenizer's chat template, with one span per part of a turn.

Spans are found by construction: the frame that the template writes around the contents is known, so all parts are. They
are tokenized together, as a pretrained model has seen them: a token may begin in one part and end in the next, as
"▁male" does after "ASSISTANT: ", and belongs to the part that it ends in.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from umbrella.base import UserError
from umbrella.conversations.conversation import Conversation, ImageItem, TextItem
from umbrella.data.chat_template import Frame, make_frame
from umbrella.data.parts import MARK, PartTokenizer
from umbrella.data.tokenizer import CHATML, IMAGE_TOKEN, load_tokenizer
from umbrella.modality import Modality, class_tokens

if TYPE_CHECKING:
    from umbrella.config import Settings

Kind = Literal["header", "text", "image", "end"]
ANSWER_STEP = 32
"""Tokens by which the length of an answer in free text is told."""


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``stop`` (exclusive): one part of one turn."""

    start: int
    stop: int
    turn: int
    role: str
    kind: Kind


@dataclass(frozen=True)
class Example:
    """A rendered conversation: token ids (L,), int64, spans that cover all of them in order, and whose it is."""

    conversation: Conversation
    input_ids: np.ndarray
    spans: tuple[Span, ...]

    @property
    def bucket_length(self) -> int:
        """By what conversations are batched with others: the tokens before the last turn, and a free text's roughly.

        The length of an answer with a label would tell "male" from "female", and batches would be of one label.
        """
        answer = next((s.start for s in self.spans if s.turn == self.spans[-1].turn), 0)
        if self.conversation.label is not None:
            return answer
        rest = len(self.input_ids) - answer
        return answer + -(-rest // ANSWER_STEP) * ANSWER_STEP


class Part(NamedTuple):
    """A part of a turn as text; its tokens are repeated ``times``."""

    turn: int
    kind: Kind
    text: str
    times: int = 1


class Renderer:
    """Turns conversations into examples. Threads may share one.

    Args:
        tokenizer: its own chat template is used; ChatML where it has none. It knows the ``<image>`` token.
        modalities: name to grid and patch, for the number of placeholders per volume.
        max_tokens: a conversation longer than this is an error.
        class_tokens: placeholders per volume beside those of its patches; see ``umbrella.modality.class_tokens``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        modalities: Mapping[str, Modality],
        max_tokens: int = 2**31,
        class_tokens: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.modalities = modalities
        self.max_tokens = max_tokens
        self.class_tokens = class_tokens
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.template = tokenizer.chat_template or CHATML
        self._parts = PartTokenizer(tokenizer)
        self._image = self._parts.by_template(IMAGE_TOKEN)
        self._frames: dict[tuple[str, ...], list[Frame]] = {}

    @property
    def stops(self) -> bool:
        """Whether the template ends an answer with a special token, so that a model can learn to stop there.

        Raises:
            UserError: the template does not write a question and its answer one after another.
        """
        return MARK in self._frame(("user", "assistant"))[-1].end

    def render(self, conversation: Conversation, answer: str | None = None) -> Example:
        """Render a conversation, with another text as the last assistant turn when ``answer`` is given.

        Raises:
            UserError: more tokens than ``max_tokens``; a template that does not write turns one after another, or
                refuses these roles, or changes what is said; words that the tokenizer makes a special token of.
        """
        turns = conversation.conversations
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None)
        parts: list[Part] = []
        for i, frame in enumerate(self._frame(tuple(turn.role for turn in turns))):
            replaced = answer is not None and i == last
            items = (TextItem(type="text", text=answer or ""),) if replaced else turns[i].content
            content = list(self._content(i, items))
            parts += [
                Part(i, "header", frame.header),
                *(_stripped(content) if frame.strips else content),
                Part(i, "end", frame.end),
            ]
        ids: list[int] = []
        spans: list[Span] = []
        for part, tokens in zip(parts, self._parts.encode([part.text for part in parts]), strict=True):
            if tokens:
                start = len(ids)
                ids += tokens * part.times
                spans.append(Span(start, len(ids), part.turn, turns[part.turn].role, part.kind))
        if len(ids) > self.max_tokens:
            raise UserError(
                f"becomes {len(ids)} tokens, more than data.max_tokens={self.max_tokens}; raise that, shorten the"
                " text or take larger patches"
            )
        return Example(conversation, np.array(ids, dtype=np.int64), tuple(spans))

    def _content(self, turn: int, items: Sequence[TextItem | ImageItem]) -> Iterator[Part]:
        for item in items:
            if isinstance(item, ImageItem):
                tokens = self.class_tokens + self.modalities[item.modality].num_tokens
                yield Part(turn, "image", self._image, tokens)
                yield Part(turn, "text", "\n")  # keeps two volumes in a row apart
            else:
                yield Part(turn, "text", self._parts.by_person(item.text))

    def _frame(self, roles: tuple[str, ...]) -> list[Frame]:
        if roles not in self._frames:
            by_template = self._parts.by_template
            self._frames[roles] = [
                Frame(by_template(header), by_template(end), strips)
                for header, end, strips in make_frame(self.tokenizer, self.template, roles)
            ]
        return self._frames[roles]


def _stripped(parts: list[Part]) -> list[Part]:
    """The parts without the blanks that they begin and end with, taken together."""
    for strip, order in ((str.lstrip, range(len(parts))), (str.rstrip, reversed(range(len(parts))))):
        for i in order:
            parts[i] = parts[i]._replace(text=strip(parts[i].text))
            if parts[i].text:
                break
    return parts


def load_renderer(settings: "Settings") -> Renderer:
    """The renderer of these settings: tokenizer and chat template of the checkpoint, modalities, ``data.max_tokens``.

    Raises:
        UserError: the checkpoint's tokenizer or configuration cannot be loaded; no such chat template.
    """
    model = settings.model
    tokenizer = load_tokenizer(model.checkpoint, model.chat_template)
    kept = _class_tokens(model.checkpoint) if model.checkpoint else 0
    return Renderer(tokenizer, settings.modalities, settings.data.max_tokens, kept)


def _class_tokens(checkpoint: str) -> int:
    # As a file and not as a class: the class of our own models lies in a room that this one does not know.
    try:
        config, _ = PretrainedConfig.get_config_dict(checkpoint)
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.checkpoint={checkpoint}: its configuration cannot be loaded: {reason}") from None
    tower = (config.get("vision_config") or {}).get("model_type", "clip_vision_model")
    return class_tokens(tower, config.get("vision_feature_select_strategy", "default"))
