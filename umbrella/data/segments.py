"""Segments of turns, and their joint tokenization: each token is assigned to one segment."""

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerBase

from umbrella.base import UserError
from umbrella.data.tokenizer import IMAGE_TOKEN

MARK = "\ue000"
"""Private-use character that starts the substitute of a special token."""
FIRST_SUBSTITUTE = 0xF0000
"""First of 65,534 private-use characters that distinguish substitutes."""


Kind = Literal["header", "text", "image", "end"]


class Segment(NamedTuple):
    """A segment of a turn as text; its tokens are repeated ``times``."""

    turn: int
    kind: Kind
    text: str
    times: int = 1


def strip_segments(segments: list[Segment]) -> list[Segment]:
    """Strip the blanks at the start and end of the concatenated segments, in place."""
    for strip, order in ((str.lstrip, range(len(segments))), (str.rstrip, reversed(range(len(segments))))):
        for i in order:
            segments[i] = segments[i]._replace(text=strip(segments[i].text))
            if segments[i].text:
                break
    return segments


def separate_volumes(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Insert a line break between adjacent volumes, because the model separates volumes by runs of placeholders."""
    # LLaVA-Interleave's template writes the images of a turn side by side; a text between two images may be empty.
    last = None
    for segment in segments:
        if segment.text:
            if last == segment.kind == "image":
                yield Segment(segment.turn, "text", "\n")
            last = segment.kind
        yield segment


class SegmentTokenizer:
    """Tokenizes consecutive segments of a text together. Thread-safe.

    Only the template can produce special tokens; "<image>" or "<|im_end|>" in the text of a turn is plain text.
    Therefore a copy of the tokenizer treats special tokens as plain text, and has a substitute for each of them
    (``MARK`` and a private-use character), which is used in the template's segments. ``MARK`` in the text of a turn
    has a substitute too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        # In some checkpoints it is not a special token.
        special.setdefault(IMAGE_TOKEN, AddedToken(IMAGE_TOKEN, special=True, normalized=False))
        substitutes = {text: MARK + chr(FIRST_SUBSTITUTE + i) for i, text in enumerate([*special, MARK])}
        self._substitutes = substitutes
        self._pattern = re.compile("|".join(re.escape(text) for text in sorted(substitutes, key=len, reverse=True)))

        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)  # the original may omit blanks
        backend.add_special_tokens([special[IMAGE_TOKEN]])
        backend.encode_special_tokens = True
        backend.add_tokens(
            [
                AddedToken(substitutes[text], lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
                for text, token in special.items()
            ]
        )
        backend.add_tokens([AddedToken(substitutes[MARK], normalized=False)])
        self._backend = backend

        ids = {text: tokenizer.convert_tokens_to_ids(text) for text in special}
        self._special_ids = {backend.token_to_id(substitutes[text]): [id] for text, id in ids.items()}
        substitute, *mark = backend.encode(substitutes[MARK] + MARK, add_special_tokens=False).ids
        self._special_ids[substitute] = mark
        self._special = {id: text for text, id in ids.items() if id != tokenizer.unk_token_id}
        bos = tokenizer.bos_token
        adds_bos = bos is not None and tokenizer("").input_ids[:1] == [ids[bos]]
        self._bos = (substitutes[bos], ids[bos]) if adds_bos else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # not pickled

    def template_text(self, text: str) -> str:
        """Replace special tokens by their substitutes."""
        return self._pattern.sub(lambda match: self._substitutes[match[0]], text)

    def plain_text(self, text: str) -> str:
        """Escape ``MARK`` in a text whose special tokens are plain text."""
        return text.replace(MARK, self._substitutes[MARK])

    def encode(self, segments: Sequence[str]) -> list[list[int]]:
        """Tokenize segments. A token belongs to the segment that contains its last character.

        If the tokenizer adds a bos token to every text and this text has none, it is added to the first segment.

        Returns:
            The token ids of each segment.

        Raises:
            UserError: the tokenizer makes a special token of plain text.
        """
        text = "".join(segments)
        encoding = self._backend.encode(text, add_special_tokens=False)
        unexpected = sorted(self._special[id] for id in self._special.keys() & set(encoding.ids))
        if unexpected:
            raise UserError(
                f"says {unexpected[0]} in words, and the tokenizer makes a special token of them; change them"
            )
        ids: list[list[int]] = [[] for _ in segments]
        if self._bos and not text.startswith(self._bos[0]):
            ids[0].append(self._bos[1])
        ends = list(accumulate(map(len, segments)))
        segment = 0
        for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            special = self._special_ids.get(id)
            if special:
                stop = text.index(MARK, start) + 1  # a special token may include adjacent blanks
            while ends[segment] < stop:
                segment += 1
            ids[segment] += special or [id]
        return ids
