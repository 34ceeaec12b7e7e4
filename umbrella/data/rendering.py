"""Text to tokens: a conversation through the tokenizer's chat template, with one span per part of a turn.

Spans are found by construction. The template is rendered once with a private mark in place of each turn's content;
what stands between the marks is, letter for letter, what the template writes around the contents. Each part is then
tokenized for itself, so a span's borders are token borders.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from umbrella.base import UserError
from umbrella.conversations.conversation import Conversation, ImageItem, TextItem
from umbrella.data.tokenizer import CHATML, IMAGE_TOKEN
from umbrella.modality import Modality

ANSWER_STEP = 32
"""Tokens by which the length of an answer in free text is told."""


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``stop`` (exclusive): one part of one turn."""

    start: int
    stop: int
    turn: int
    role: str
    kind: Literal["header", "text", "image", "end"]


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


class Renderer:
    """Turns conversations into examples.

    Args:
        tokenizer: its own chat template is used; ChatML where it has none. It knows the ``<image>`` token.
        modalities: name to grid and patch, for the number of placeholders per volume.
        max_tokens: a conversation longer than this is an error.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, modalities: Mapping[str, Modality], max_tokens: int = 2**31
    ) -> None:
        self.tokenizer = tokenizer
        # A tokenizer keeps `split_special_tokens` as a state of its own, and batches are rendered by several threads:
        # one tokenizer for both uses would now and then write the template's marks as letters.
        self._plain = copy.deepcopy(tokenizer)
        self.modalities = modalities
        self.max_tokens = max_tokens
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.template = tokenizer.chat_template or CHATML
        self._frames: dict[tuple[str, ...], list[tuple[str, str]]] = {}

    def render(self, conversation: Conversation, answer: str | None = None) -> Example:
        """Render a conversation, with another text as the last assistant turn when ``answer`` is given.

        Raises:
            UserError: more tokens than ``max_tokens``; a template that does not write turns one after another, or
                refuses these roles.
        """
        turns = conversation.conversations
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None)
        ids: list[int] = []
        spans: list[Span] = []

        def add(tokens: list[int], turn: int, kind: Literal["header", "text", "image", "end"]) -> None:
            if tokens:
                spans.append(Span(len(ids), len(ids) + len(tokens), turn, turns[turn].role, kind))
                ids.extend(tokens)

        for i, (header, end) in enumerate(self._frame(tuple(turn.role for turn in turns))):
            add(self._tokens(header, special=True), i, "header")
            replaced = answer is not None and i == last
            items = (TextItem(type="text", text=answer or ""),) if replaced else turns[i].content
            for item in items:
                if isinstance(item, ImageItem):
                    add([self.image_id] * self.modalities[item.modality].num_tokens, i, "image")
                    add(self._tokens("\n"), i, "text")  # keeps two volumes in a row apart
                else:
                    add(self._tokens(item.text), i, "text")
            add(self._tokens(end, special=True), i, "end")
        if len(ids) > self.max_tokens:
            raise UserError(
                f"becomes {len(ids)} tokens, more than data.max_tokens={self.max_tokens}; raise that, shorten the"
                " text or take larger patches"
            )
        return Example(conversation, np.array(ids, dtype=np.int64), tuple(spans))

    def _tokens(self, text: str, special: bool = False) -> list[int]:
        # Only the template's own text may hold special tokens: a person who writes "<image>" or "<|im_end|>" in a
        # question has written words.
        tokenizer = self.tokenizer if special else self._plain
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)

    def _frame(self, roles: tuple[str, ...]) -> list[tuple[str, str]]:
        """(header, end) of each turn: what the template writes before and after its content."""
        if roles not in self._frames:
            self._frames[roles] = self._make_frame(roles)
        return self._frames[roles]

    def _make_frame(self, roles: Sequence[str]) -> list[tuple[str, str]]:
        marks = [f"\ue000{i}\ue001" for i in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        frame = []
        before = ""
        for i, mark in enumerate(marks):
            try:
                rendered = self.tokenizer.apply_chat_template(
                    messages[: i + 1], chat_template=self.template, tokenize=False
                )
            except TemplateError as error:
                raise UserError(f"the tokenizer's chat template refuses turns of {', '.join(roles)}: {error}") from None
            header, found, end = rendered.removeprefix(before).partition(mark)
            if not rendered.startswith(before) or not found:
                raise UserError("the tokenizer's chat template does not write each turn after the ones before it")
            frame.append((header, end))
            before = rendered
        return frame
