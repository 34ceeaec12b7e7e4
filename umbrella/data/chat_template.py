"""What a chat template writes around the contents of turns.

The template is rendered once with a private mark in place of each text. What stands between the marks is, letter for
letter, what the template writes around them.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from umbrella.base import UserError
from umbrella.data.parts import MARK
from umbrella.data.tokenizer import IMAGE_TOKEN


class TurnShape(NamedTuple):
    """A turn without what it says: its role, and "text" or "image" for each of its items."""

    role: str
    items: tuple[str, ...]


class Frame(NamedTuple):
    """What a template writes before and after a turn's content, and between its items.

    ``between`` is None where the template is given the content as one text. Where ``strips``, this text, or else each
    text item, loses the blanks around it.
    """

    header: str
    end: str
    strips: bool
    between: tuple[str, ...] | None = None


def make_frame(tokenizer: PreTrainedTokenizerBase, template: str, turns: Sequence[TurnShape]) -> list[Frame]:
    """The frame of each turn. A template may take contents as texts, or as lists of items.

    One that takes items is given those of the turn, if it writes them in the order of the turn and images as
    ``<image>``. Else it is given the content as one text item: what is said keeps its order.

    Raises:
        UserError: the template does not write one turn after another, refuses these roles, or changes contents.
    """
    roles = [turn.role for turn in turns]
    known: list[TurnShape | None] = [None] * len(turns)  # None: as one text
    try:
        return _read_frame(tokenizer, template, roles, known, as_text=True)
    except UserError as error:
        # A processor's template wants items, and writes nothing of a text.
        with suppress(UserError):
            return _read_frame(tokenizer, template, roles, turns)
        try:
            frames = _read_frame(tokenizer, template, roles, known)
        except UserError:
            raise error from None
    for i, turn in enumerate(turns):
        given = [*known[:i], turn, *known[i + 1 :]]
        with suppress(UserError):
            frames = _read_frame(tokenizer, template, roles, given)
            known = given
    return frames


def _read_frame(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    roles: Sequence[str],
    shapes: Sequence[TurnShape | None],
    as_text: bool = False,
) -> list[Frame]:
    def write(contents: Sequence[Sequence[str]]) -> str:
        messages = [
            {"role": role, "content": content[0] if as_text else [_item(text) for text in content]}
            for role, content in zip(roles, contents, strict=False)
        ]
        try:
            return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (TemplateError, TypeError) as error:
            raise UserError(f"the tokenizer's chat template refuses turns of {', '.join(roles)}: {error}") from None

    kinds = [shape.items if shape else ("text",) for shape in shapes]
    contents = [
        [IMAGE_TOKEN if kind == "image" else f"{MARK}{i}/{j}{MARK}" for j, kind in enumerate(turn)]
        for i, turn in enumerate(kinds)
    ]
    changed = UserError(
        "the tokenizer's chat template changes what turns say, or says it twice; all it may do is strip the blanks on"
        " both sides"
    )
    around = []
    before = ""
    for i, content in enumerate(contents):
        rendered = write(contents[: i + 1])
        pieces = re.split(f"({'|'.join(content)})", rendered.removeprefix(before))
        gaps, found = pieces[::2], pieces[1::2]
        if not rendered.startswith(before) or set(found) != set(content):
            raise UserError("the tokenizer's chat template does not write each turn after the ones before it")
        if found != content:
            raise changed
        around.append(gaps)
        before = rendered

    padded = [[item if item == IMAGE_TOKEN else f" \n{item}\n " for item in content] for content in contents]
    rendered = write(padded)
    frames = []
    written = ""
    for shape, content, pads, gaps in zip(shapes, contents, padded, around, strict=True):
        texts = [pad for pad in pads if pad != IMAGE_TOKEN]
        strips = bool(texts) and not any(pad in rendered for pad in texts)
        kept = content if strips else pads
        written += "".join(gap + item for gap, item in zip(gaps, [*kept, ""], strict=True))
        frames.append(Frame(gaps[0], gaps[-1], strips, tuple(gaps[1:-1]) if shape else None))
    if rendered != written or any(written.count(item) > 1 for content in contents for item in content if MARK in item):
        raise changed
    return frames


def _item(text: str) -> dict[str, Any]:
    return {"type": "image"} if text == IMAGE_TOKEN else {"type": "text", "text": text}
