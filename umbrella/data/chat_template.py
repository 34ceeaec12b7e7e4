"""What a chat template writes around the contents of turns.

The template is rendered once with a private mark in place of each turn's content. What stands between the marks is,
letter for letter, what the template writes around them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from umbrella.base import UserError
from umbrella.data.parts import MARK


class Frame(NamedTuple):
    """What stands before and after a turn's content, and whether the content is stripped of the blanks around it."""

    header: str
    end: str
    strips: bool


def make_frame(tokenizer: PreTrainedTokenizerBase, template: str, roles: tuple[str, ...]) -> list[Frame]:
    """The frame of each turn of these roles. A template may take contents as texts, or as lists of items.

    Raises:
        UserError: the template does not write one turn after another, refuses these roles, or changes contents.
    """
    try:
        return _read_frame(tokenizer, template, roles, lambda text: text)
    except UserError as error:
        # A processor's template wants items, and writes nothing of a text.
        try:
            return _read_frame(tokenizer, template, roles, lambda text: [{"type": "text", "text": text}])
        except UserError:
            raise error from None


def _read_frame(
    tokenizer: PreTrainedTokenizerBase, template: str, roles: tuple[str, ...], content: Callable[[str], Any]
) -> list[Frame]:
    def write(texts: Sequence[str]) -> str:
        messages = [{"role": role, "content": content(text)} for role, text in zip(roles, texts, strict=False)]
        try:
            return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (TemplateError, TypeError) as error:
            raise UserError(f"the tokenizer's chat template refuses turns of {', '.join(roles)}: {error}") from None

    marks = [f"{MARK}{i}{MARK}" for i in range(len(roles))]
    around = []
    before = ""
    for i, mark in enumerate(marks):
        rendered = write(marks[: i + 1])
        header, found, end = rendered.removeprefix(before).partition(mark)
        if not rendered.startswith(before) or not found:
            raise UserError("the tokenizer's chat template does not write each turn after the ones before it")
        around.append((header, end))
        before = rendered

    padded = [f" \n{mark}\n " for mark in marks]
    rendered = write(padded)
    strips = [pad not in rendered for pad in padded]
    kept = [mark if bare else pad for mark, pad, bare in zip(marks, padded, strips, strict=True)]
    written = "".join(header + text + end for (header, end), text in zip(around, kept, strict=True))
    if rendered != written or any(written.count(mark) > 1 for mark in marks):
        raise UserError(
            "the tokenizer's chat template changes what turns say, or says it twice; all it may do is strip the blanks"
            " on both sides"
        )
    return [Frame(header, end, bare) for (header, end), bare in zip(around, strips, strict=True)]
