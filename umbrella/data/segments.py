"""The parts of turns as texts, and a text of parts to tokens: tokenized as a whole, each token given to one part."""

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
"""A character for private use. It stands in a text where something else is meant."""
LETTERS = 0xF0000
"""The first of 65,534 more such characters. They tell stand-ins apart."""


Kind = Literal["header", "text", "image", "end"]


class Part(NamedTuple):
    """A part of a turn as text; its tokens are repeated ``times``."""

    turn: int
    kind: Kind
    text: str
    times: int = 1


def stripped(parts: list[Part]) -> list[Part]:
    """The parts without the blanks that they begin and end with, taken together."""
    for strip, order in ((str.lstrip, range(len(parts))), (str.rstrip, reversed(range(len(parts))))):
        for i in order:
            parts[i] = parts[i]._replace(text=strip(parts[i].text))
            if parts[i].text:
                break
    return parts


def keep_volumes_apart(parts: Iterable[Part]) -> Iterator[Part]:
    """The parts with a line break between two volumes where nothing else is: the model tells them apart by runs."""
    # LLaVA-Interleave's template writes the images of a turn side by side; a turn may also say "" between two.
    last = None
    for part in parts:
        if part.text:
            if last == part.kind == "image":
                yield Part(part.turn, "text", "\n")
            last = part.kind
        yield part


class PartTokenizer:
    """Tokenizes parts of a text together, as they follow each other.

    Only the template can write special tokens: a person who writes "<image>" or "<|im_end|>" has written words. So
    the copy of the tokenizer in here takes every special token for words, and knows a stand-in for each, a mark and a
    letter, that the template's parts are written with. A mark in what a person writes has a stand-in as well.
    Threads may share one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        # Some checkpoints have it as a word.
        special.setdefault(IMAGE_TOKEN, AddedToken(IMAGE_TOKEN, special=True, normalized=False))
        standins = {text: MARK + chr(LETTERS + i) for i, text in enumerate([*special, MARK])}
        self._standins = standins
        self._pattern = re.compile("|".join(re.escape(text) for text in sorted(standins, key=len, reverse=True)))

        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)  # its own may leave blanks out of the offsets
        backend.add_special_tokens([special[IMAGE_TOKEN]])
        backend.encode_special_tokens = True
        backend.add_tokens(
            [
                AddedToken(standins[text], lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
                for text, token in special.items()
            ]
        )
        backend.add_tokens([AddedToken(standins[MARK], normalized=False)])
        self._backend = backend

        ids = {text: tokenizer.convert_tokens_to_ids(text) for text in special}
        self._meant = {backend.token_to_id(standins[text]): [id] for text, id in ids.items()}
        standin, *mark = backend.encode(standins[MARK] + MARK, add_special_tokens=False).ids
        self._meant[standin] = mark
        self._special = {id: text for text, id in ids.items() if id != tokenizer.unk_token_id}
        bos = tokenizer.bos_token
        begins = bos is not None and tokenizer("").input_ids[:1] == [ids[bos]]
        self._bos = (standins[bos], ids[bos]) if begins else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # the one thing that is not pickled with it

    def by_template(self, text: str) -> str:
        """The text as a part in which special tokens are meant."""
        return self._pattern.sub(lambda found: self._standins[found[0]], text)

    def by_person(self, text: str) -> str:
        """The text as a part that is words and nothing else."""
        return text.replace(MARK, self._standins[MARK])

    def encode(self, parts: Sequence[str]) -> list[list[int]]:
        """The token ids of each part. A token belongs to the part that holds its last character.

        The first part begins with the bos token where the tokenizer begins every text with it and this text does not.

        Raises:
            UserError: words that the tokenizer makes a special token of.
        """
        text = "".join(parts)
        encoding = self._backend.encode(text, add_special_tokens=False)
        confused = sorted(self._special[id] for id in self._special.keys() & set(encoding.ids))
        if confused:
            raise UserError(
                f"says {confused[0]} in words, and the tokenizer makes a special token of them; change them"
            )
        ids: list[list[int]] = [[] for _ in parts]
        if self._bos and not text.startswith(self._bos[0]):
            ids[0].append(self._bos[1])
        borders = list(accumulate(map(len, parts)))
        part = 0
        for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            meant = self._meant.get(id)
            if meant:
                stop = text.index(MARK, start) + 1  # a special token may take in the blanks beside it
            while borders[part] < stop:
                part += 1
            ids[part] += meant or [id]
        return ids
