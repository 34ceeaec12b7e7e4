"""Text to tokens: a conversation through the tokenizer's chat template, with one span per part of a turn.

Spans are found by construction: the frame that the template writes around the contents is known, so all parts are. They
are tokenized together, as a pretrained model has seen them: a token may begin in one part and end in the next, as
"▁male" does after "ASSISTANT: ", and belongs to the part that it ends in.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from umbrella.base import UserError, describe_load_error
from umbrella.conversations.schema import Conversation, ImageItem, TextItem
from umbrella.data.chat_template import Frame, TurnShape, make_frame
from umbrella.data.segments import MARK, Kind, Part, PartTokenizer, keep_volumes_apart, stripped
from umbrella.data.tokenizer import CHATML, IMAGE_TOKEN, load_tokenizer
from umbrella.modality import Modality, class_tokens

if TYPE_CHECKING:
    from umbrella.config import Settings

PROBES = ("A", "0")
"""Answers that a tokenizer may join with the blank before them, and may not."""
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
    in_loss: bool = True
    """Whether the training loss may supervise it; see ``Turn.in_loss``."""


@dataclass(frozen=True)
class Example:
    """A rendered conversation: token ids (L,), int64, spans that cover all of them in order, and whose it is."""

    conversation: Conversation
    input_ids: np.ndarray
    spans: tuple[Span, ...]

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest assistant turn, with its end of turn and without its header."""
        lengths: Counter[int] = Counter()
        for span in self.spans:
            if span.role == "assistant" and span.kind != "header":
                lengths[span.turn] += span.stop - span.start
        return max(lengths.values(), default=0)

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


class Renderer:
    """Turns conversations into examples. Threads may share one.

    Args:
        tokenizer: its own chat template is used; ChatML where it has none. It knows the ``<image>`` token.
        modalities: name to grid and patch, for the number of placeholders per volume.
        max_tokens: a conversation longer than this is an error.
        class_tokens: placeholders per volume beside those of its patches; see ``umbrella.modality.class_tokens``.
        positions: that the language model has; a conversation longer than this is an error.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        modalities: Mapping[str, Modality],
        max_tokens: int = 2**31,
        class_tokens: int = 0,
        positions: int = 2**31,
    ) -> None:
        self.tokenizer = tokenizer
        self.modalities = modalities
        self.max_tokens = max_tokens
        self.class_tokens = class_tokens
        self.positions = positions
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.template = tokenizer.chat_template or CHATML
        self._parts = PartTokenizer(tokenizer)
        self._image = self._parts.by_template(IMAGE_TOKEN)
        self._frames: dict[tuple[TurnShape, ...], list[Frame] | UserError] = {}

    @property
    def stops(self) -> bool:
        """Whether the template ends an answer with a special token, so that a model can learn to stop there.

        Raises:
            UserError: the template does not write a question and its answer one after another.
        """
        return MARK in self._frame((TurnShape("user", ("text",)), TurnShape("assistant", ("text",))))[-1].end

    def render(self, conversation: Conversation, answer: str | None = None) -> Example:
        """Render a conversation, with another text as the last assistant turn when ``answer`` is given.

        Volumes stand where the template writes images, if it takes items and keeps their order, and are followed by a
        line break otherwise. Two in a row are kept apart by a line break too where the template writes nothing.

        Raises:
            UserError: more tokens than ``max_tokens`` or ``positions``, unless ``answer`` is given; a template that
                does not write turns one after another, or refuses these roles, or changes what is said; words that the
                tokenizer makes a special token of; volumes that the tokenizer makes one of.
        """
        turns = conversation.conversations
        contents = [turn.content for turn in turns]
        if answer is not None:
            contents[conversation.last_answer] = (TextItem(type="text", text=answer),)
        shapes = (TurnShape(t.role, tuple(x.type for x in items)) for t, items in zip(turns, contents, strict=True))
        parts: list[Part] = []
        for i, frame in enumerate(self._frame(tuple(shapes))):
            content = self._content(i, contents[i], frame)
            parts += [Part(i, "header", frame.header), *content, Part(i, "end", frame.end)]
        parts = list(keep_volumes_apart(parts))
        # An answer that is given is one to be scored: the flags of its turn concern the training loss only.
        in_loss = [answer is not None or turn.in_loss for turn in turns]
        ids: list[int] = []
        spans: list[Span] = []
        for part, tokens in zip(parts, self._parts.encode([part.text for part in parts]), strict=True):
            if tokens:
                start = len(ids)
                ids += tokens * part.times
                spans.append(Span(start, len(ids), part.turn, turns[part.turn].role, part.kind, in_loss[part.turn]))
        if answer is None and len(ids) > self.max_tokens:
            raise UserError(
                f"becomes {len(ids)} tokens, more than data.max_tokens={self.max_tokens}; raise that, shorten the"
                " text or take larger patches"
            )
        if answer is None and len(ids) > self.positions:
            raise UserError(
                f"becomes {len(ids)} tokens, and model.checkpoint has {self.positions} positions"
                " (max_position_embeddings); shorten the text or take larger patches"
            )
        example = Example(conversation, np.array(ids, dtype=np.int64), tuple(spans))
        self._check_volumes(example.input_ids, sum(part.kind == "image" for part in parts))
        return example

    def prompt(self, conversation: Conversation) -> Example:
        """What stands before the last assistant turn's text, whatever that says: an answer is generated after it.

        The tokens are those of ``render``, up to the answer's first. Where a token begins in the header and ends in an
        answer, as "▁male" does and "▁" before a number does not, it is left to the answer.

        Raises:
            UserError: as ``render``.
        """
        turns, last = conversation.conversations, conversation.last_answer
        blank = turns[last].model_copy(update={"content": (TextItem(type="text", text=""),)})
        asked = conversation.model_copy(update={"conversations": (*turns[:last], blank)})
        rendered = [self.render(asked, probe) for probe in PROBES]
        starts = [next(s.start for s in e.spans if (s.turn, s.kind) == (last, "text")) for e in rendered]
        stop, example = min(zip(starts, rendered, strict=True), key=lambda pair: pair[0])
        return Example(asked, example.input_ids[:stop], tuple(s for s in example.spans if s.stop <= stop))

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the special ones that the template ends a turn with, and the end of a text.

        Raises:
            UserError: as ``stops``.
        """
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        example = self.render(Conversation(task_id="stop", task_type="stop", conversations=said))
        spans = [span for span in example.spans if (span.turn, span.kind) == (1, "end")]
        end = {id for span in spans for id in example.input_ids[span.start : span.stop].tolist()}
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        own = {self.tokenizer.eos_token_id} - {None}
        return sorted(end & special | own)

    def _content(self, turn: int, items: Sequence[TextItem | ImageItem], frame: Frame) -> list[Part]:
        as_one = frame.between is None
        parts: list[Part] = []
        for i, item in enumerate(items):
            if i and frame.between:
                parts.append(Part(turn, "text", frame.between[i - 1]))
            if isinstance(item, ImageItem):
                tokens = self.class_tokens + self.modalities[item.modality].num_tokens
                parts.append(Part(turn, "image", self._image, tokens))
                if as_one:
                    parts.append(Part(turn, "text", "\n"))
            else:
                text = item.text.strip() if frame.strips and not as_one else item.text
                parts.append(Part(turn, "text", self._parts.by_person(text)))
        return stripped(parts) if frame.strips and as_one else parts

    def _check_volumes(self, ids: np.ndarray, volumes: int) -> None:
        starts = np.diff(ids == self.image_id, prepend=False) & (ids == self.image_id)
        if starts.sum() != volumes:
            raise UserError(
                f"has {volumes} volumes but, as tokens, {IMAGE_TOKEN} in {starts.sum()} place(s): the chat template"
                " writes one of its own, or that token takes in the blanks between volumes (its lstrip or rstrip is"
                " set); change the tokenizer, or write words between the volumes"
            )

    def _frame(self, turns: tuple[TurnShape, ...]) -> list[Frame]:
        if turns not in self._frames:
            by_template = self._parts.by_template
            try:
                self._frames[turns] = [
                    Frame(by_template(header), by_template(end), strips, between and tuple(map(by_template, between)))
                    for header, end, strips, between in make_frame(self.tokenizer, self.template, turns)
                ]
            except UserError as error:  # kept, since to find it out again may take seconds
                self._frames[turns] = error
        frames = self._frames[turns]
        if isinstance(frames, UserError):
            raise UserError(str(frames))
        return frames


def load_renderer(settings: "Settings") -> Renderer:
    """The renderer of these settings: tokenizer and chat template of the checkpoint, modalities, ``data.max_tokens``.

    Raises:
        UserError: the checkpoint's tokenizer or configuration cannot be loaded; the tokenizer has more tokens than the
            model's embedding; no such chat template.
    """
    model = settings.model
    tokenizer = load_tokenizer(model.checkpoint, model.chat_template)
    if not model.checkpoint:
        return Renderer(tokenizer, settings.modalities, settings.data.max_tokens)
    config = _config(model.checkpoint)
    tower = (config.get("vision_config") or {}).get("model_type", "clip_vision_model")
    kept = class_tokens(tower, config.get("vision_feature_select_strategy", "default"))
    text = _text_config(config)
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, text.get("vocab_size", 2**31)
    if tokens > rows:
        raise UserError(
            f"model.checkpoint={model.checkpoint}: its tokenizer has {tokens} tokens, and the model's embedding has"
            f" {rows} rows; use the model's own tokenizer, or save the model after resize_token_embeddings({tokens})"
        )
    positions = text.get("max_position_embeddings", 2**31)
    return Renderer(tokenizer, settings.modalities, settings.data.max_tokens, kept, positions)


def _config(checkpoint: str) -> dict[str, Any]:
    # As a file and not as a class: the class of our own models lies in a room that this one does not know.
    try:
        return PretrainedConfig.get_config_dict(checkpoint)[0]
    except OSError as error:
        reason = describe_load_error(error)
        raise UserError(f"model.checkpoint={checkpoint}: its configuration cannot be loaded: {reason}") from None


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's configuration, with the defaults of its kind; empty where the kind is not known."""
    from transformers import CONFIG_MAPPING

    own = config.get("text_config") or {}
    kind = own.get("model_type", "llama")  # the default of LLaVA's configurations
    return {**CONFIG_MAPPING[kind]().to_dict(), **own} if "text_config" in config and kind in CONFIG_MAPPING else {}
