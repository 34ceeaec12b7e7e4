"""Rendering of conversations to tokens with the chat template, with one span for each segment of a turn.

The text that the template adds around contents is known, so spans follow by construction. Segments are tokenized
together, as in the training of pretrained models: a token may start in one segment and end in the next, as "▁male"
after "ASSISTANT: ", and belongs to the segment in which it ends.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from umbrella.base import UserError, describe_load_error
from umbrella.conversations.schema import Conversation, ImageItem, TextItem
from umbrella.data.chat_template import Frame, TurnShape, turn_frames
from umbrella.data.tokenizer import IMAGE_TOKEN, SegmentTokenizer, load_tokenizer
from umbrella.modality import Modality, class_tokens

if TYPE_CHECKING:
    from umbrella.config import Settings

PROBES = ("A", "0")
"""Answers that a tokenizer may or may not join with the preceding blank."""
ANSWER_STEP = 32
"""Free-text answer lengths are rounded up to a multiple of this for batching by length."""
Kind = Literal["header", "text", "image", "end"]


class Segment(NamedTuple):
    """A segment of a turn as text; its tokens are repeated ``times``."""

    turn: int
    kind: Kind
    text: str
    times: int = 1


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``stop`` (exclusive) of one segment of a turn."""

    start: int
    stop: int
    turn: int
    role: str
    kind: Kind
    in_loss: bool = True
    """Whether the training loss may include it; see ``Turn.in_loss``."""


@dataclass(frozen=True)
class Example:
    """A rendered conversation: token ids (L,), int64, and the spans that cover them in order."""

    conversation: Conversation
    input_ids: np.ndarray
    spans: tuple[Span, ...]

    @property
    def longest_answer(self) -> int:
        """Number of tokens of the longest assistant turn, with its end and without its header."""
        lengths: Counter[int] = Counter()
        for span in self.spans:
            if span.role == "assistant" and span.kind != "header":
                lengths[span.turn] += span.stop - span.start
        return max(lengths.values(), default=0)

    @property
    def bucket_length(self) -> int:
        """Length for batching: the tokens before the last turn, plus the rounded length of a free-text answer.

        Answers with a label are not included, because batches would then contain a single label.
        """
        labelled = {len(q.conversations) - 1 for q in self.conversation.questions() if q.label is not None}
        lengths: Counter[int] = Counter()
        for span in self.spans:
            lengths[span.turn] += span.stop - span.start
        last = lengths.pop(self.spans[-1].turn) if self.spans else 0
        length = sum(number for turn, number in lengths.items() if turn not in labelled)
        if len(self.conversation.conversations) - 1 in labelled:
            return length
        return length + -(-last // ANSWER_STEP) * ANSWER_STEP


class Renderer:
    """Renders conversations to examples. Thread-safe.

    Args:
        tokenizer: tokenizer with a chat template and the ``<image>`` token.
        modalities: modalities by name, for the number of placeholders per volume.
        max_tokens: maximum number of tokens of a conversation.
        class_tokens: additional placeholders per volume; see ``umbrella.modality.class_tokens``.
        positions: number of positions of the language model, the other limit on the number of tokens.
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
        self._segment_tokenizer = SegmentTokenizer(tokenizer)
        self._frames: dict[tuple[TurnShape, ...], list[Frame] | UserError] = {}

    @property
    def has_stop_token(self) -> bool:
        """Whether the template ends an answer with a special token, so that a model can learn to stop."""
        return bool(self._end_tokens())

    def stop_ids(self) -> list[int]:
        """Return the tokens that end an answer: special tokens at the end of a turn in the template, and eos."""
        return sorted(self._end_tokens() | {self.tokenizer.eos_token_id} - {None})

    def render(self, conversation: Conversation, answer: str | None = None) -> Example:
        """Render a conversation, optionally with ``answer`` as the text of the last assistant turn.

        If the template takes content as items and keeps their order, it places the images. Otherwise each image is
        followed by a line break. Adjacent images are separated by a line break.

        Raises:
            UserError: there are more tokens than ``max_tokens`` or ``positions`` (not checked if ``answer`` is given),
                the template is not supported (see ``turn_frames``), the tokenizer makes a special token of plain text,
                or it merges volumes.
        """
        turns = conversation.conversations
        contents = [turn.content for turn in turns]
        if answer is not None:
            contents[conversation.last_answer] = (TextItem(type="text", text=answer),)
        shapes = (TurnShape(t.role, tuple(x.type for x in items)) for t, items in zip(turns, contents, strict=True))
        segments: list[Segment] = []
        for i, frame in enumerate(self._frame(tuple(shapes))):
            content = self._content(i, contents[i], frame)
            segments += [Segment(i, "header", frame.header), *content, Segment(i, "end", frame.end)]
        segments = list(_separate_volumes(segments))
        # A given answer is scored; the flags of its turn concern only the training loss.
        in_loss = [answer is not None or turn.in_loss for turn in turns]
        ids: list[int] = []
        spans: list[Span] = []
        ids_of_segments = self._segment_tokenizer.encode([segment.text for segment in segments])
        for segment, tokens in zip(segments, ids_of_segments, strict=True):
            if tokens:
                start = len(ids)
                ids += tokens * segment.times
                i = segment.turn
                spans.append(Span(start, len(ids), i, turns[i].role, segment.kind, in_loss[i]))
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
        input_ids = np.array(ids, dtype=np.int64)
        is_image = input_ids == self.image_id
        runs = int((np.diff(is_image, prepend=False) & is_image).sum())
        volumes = sum(segment.kind == "image" for segment in segments)
        if runs != volumes:
            raise UserError(
                f"has {volumes} volumes but, as tokens, {IMAGE_TOKEN} in {runs} place(s): the chat template writes one"
                " of its own, or that token takes in the blanks between volumes (its lstrip or rstrip is set); change"
                " the tokenizer, or write words between the volumes"
            )
        return Example(conversation, input_ids, tuple(spans))

    def prompt(self, conversation: Conversation) -> Example:
        """Render the conversation up to the text of the last assistant turn, as the prompt for generation.

        The tokens are those of ``render`` before the answer. A token that may start in the header and end in the
        answer, such as "▁male", does not belong to the prompt.

        Raises:
            UserError: see ``render``.
        """
        turns, last = conversation.conversations, conversation.last_answer
        blank = turns[last].model_copy(update={"content": (TextItem(type="text", text=""),)})
        prompted = conversation.model_copy(update={"conversations": (*turns[:last], blank)})
        rendered = [self.render(prompted, probe) for probe in PROBES]
        starts = [next(s.start for s in e.spans if (s.turn, s.kind) == (last, "text")) for e in rendered]
        stop, example = min(zip(starts, rendered, strict=True), key=lambda pair: pair[0])
        return Example(prompted, example.input_ids[:stop], tuple(s for s in example.spans if s.stop <= stop))

    def _end_tokens(self) -> set[int]:
        end = self._frame((TurnShape("user", ("text",)), TurnShape("assistant", ("text",))))[-1].end
        _, ids = self._segment_tokenizer.encode(["", end])  # bos, if any, is in the first segment
        return {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special and id in ids}

    def _content(self, turn: int, items: Sequence[TextItem | ImageItem], frame: Frame) -> list[Segment]:
        as_one = frame.between is None
        image = self._segment_tokenizer.template_text(IMAGE_TOKEN)
        segments: list[Segment] = []
        for i, item in enumerate(items):
            if i and frame.between:
                segments.append(Segment(turn, "text", frame.between[i - 1]))
            if isinstance(item, ImageItem):
                tokens = self.class_tokens + self.modalities[item.modality].num_tokens
                segments.append(Segment(turn, "image", image, tokens))
                if as_one:
                    segments.append(Segment(turn, "text", "\n"))
            else:
                text = item.text.strip() if frame.strips and not as_one else item.text
                segments.append(Segment(turn, "text", self._segment_tokenizer.plain_text(text)))
        return _strip_segments(segments) if frame.strips and as_one else segments

    def _frame(self, turns: tuple[TurnShape, ...]) -> list[Frame]:
        if turns not in self._frames:
            escape = self._segment_tokenizer.template_text
            try:
                self._frames[turns] = [
                    Frame(escape(header), escape(end), strips, between and tuple(map(escape, between)))
                    for header, end, strips, between in turn_frames(self.tokenizer, turns)
                ]
            except UserError as error:  # cached, because rendering may take seconds
                self._frames[turns] = error
        frames = self._frames[turns]
        if isinstance(frames, UserError):
            raise UserError(str(frames))
        return frames


def _strip_segments(segments: list[Segment]) -> list[Segment]:
    """Strip the blanks at the start and end of the concatenated segments, in place."""
    for strip, order in ((str.lstrip, range(len(segments))), (str.rstrip, reversed(range(len(segments))))):
        for i in order:
            segments[i] = segments[i]._replace(text=strip(segments[i].text))
            if segments[i].text:
                break
    return segments


def _separate_volumes(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Insert a line break between adjacent volumes, because the model separates volumes by runs of placeholders."""
    # LLaVA-Interleave's template writes the images of a turn side by side; a text between two images may be empty.
    last = None
    for segment in segments:
        if segment.text:
            if last == segment.kind == "image":
                yield Segment(segment.turn, "text", "\n")
            last = segment.kind
        yield segment


def load_renderer(settings: "Settings") -> Renderer:
    """Make the renderer for the settings of model, modalities and ``data.max_tokens``.

    Raises:
        UserError: the tokenizer, its chat template or the configuration of the checkpoint cannot be loaded, or the
            tokenizer has more tokens than the embedding of the model.
    """
    from transformers import CONFIG_MAPPING

    model, max_tokens = settings.model, settings.data.max_tokens
    tokenizer = load_tokenizer(model.checkpoint, model.chat_template)
    if not model.checkpoint:
        return Renderer(tokenizer, settings.modalities, max_tokens)
    where = f"model.checkpoint={model.checkpoint}"
    try:  # read as a file: this package does not import the configuration classes of our own models
        config = PretrainedConfig.get_config_dict(model.checkpoint)[0]
    except OSError as error:
        raise UserError(f"{where}: its configuration cannot be loaded: {describe_load_error(error)}") from None
    tower = (config.get("vision_config") or {}).get("model_type", "clip_vision_model")
    kept = class_tokens(tower, config.get("vision_feature_select_strategy", "default"))
    text = config.get("text_config") or {}
    kind = text.get("model_type", "llama")  # the default of LLaVA's configurations
    if "text_config" in config and kind in CONFIG_MAPPING:
        text = CONFIG_MAPPING[kind]().to_dict() | text
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, text.get("vocab_size", 2**31)
    if tokens > rows:
        raise UserError(
            f"{where}: its tokenizer has {tokens} tokens, and the model's embedding has {rows} rows; use the model's"
            f" own tokenizer, or save the model after resize_token_embeddings({tokens})"
        )
    positions = text.get("max_position_embeddings", 2**31)
    return Renderer(tokenizer, settings.modalities, max_tokens, kept, positions)
