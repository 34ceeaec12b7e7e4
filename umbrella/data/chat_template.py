"""Extraction of the text that a chat template adds around the contents of turns.

The template is rendered with a private-use marker in place of each text; the template's own text is what is between the
markers.
"""

import re
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn

import psutil
from transformers import PreTrainedTokenizerBase

from umbrella.base import UserError
from umbrella.data.tokenizer import IMAGE_TOKEN, MARK

MAX_SECONDS, MAX_BYTES = 2.0, 1 << 30
"""Limits on processor time and memory for rendering a template once."""


class TurnShape(NamedTuple):
    """Role of a turn, and "text" or "image" for each of its items."""

    role: str
    items: tuple[str, ...]


class Frame(NamedTuple):
    """Text that a template adds before and after the content of a turn, and between its items.

    ``between`` is None if the content is passed as one text. With ``strips``, the template strips this text, or each
    text item.
    """

    header: str
    end: str
    strips: bool
    between: tuple[str, ...] | None = None


def turn_frames(tokenizer: PreTrainedTokenizerBase, turns: Sequence[TurnShape]) -> list[Frame]:
    """Return the frame of each turn in the chat template. A template may take contents as texts or as lists of items.

    If the template takes items, keeps their order and writes images as ``<image>``, it gets the items of the turn.
    Otherwise it gets the content as one text item, which keeps the order.

    Raises:
        UserError: the template does not write turns one after another, refuses these roles, or changes contents.
    """
    roles = [turn.role for turn in turns]
    known: list[TurnShape | None] = [None] * len(turns)  # None: content as one text
    try:
        return _read_frames(tokenizer, roles, known, as_text=True)
    except UserError as error:
        # Templates of processors take items and ignore strings.
        with suppress(UserError):
            return _read_frames(tokenizer, roles, turns)
        try:
            frames = _read_frames(tokenizer, roles, known)
        except UserError:
            raise error from None
    for shape in dict.fromkeys(turns):
        given = [turn if turn == shape else old for turn, old in zip(turns, known, strict=True)]
        with suppress(UserError):
            frames = _read_frames(tokenizer, roles, given)
            known = given
    return frames


def _read_frames(
    tokenizer: PreTrainedTokenizerBase,
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
            with _limited():
                return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template can raise anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"the tokenizer's chat template refuses turns of {', '.join(roles)}: {reason}") from None

    contents = [
        [
            IMAGE_TOKEN if kind == "image" else f"{MARK}{i}/{j}{MARK}"
            for j, kind in enumerate(shape.items if shape else ("text",))
        ]
        for i, shape in enumerate(shapes)
    ]
    changed = UserError(
        "the tokenizer's chat template changes what turns say, or says it twice; all it may do is strip the blanks on"
        " both sides"
    )
    around: list[list[str]] = []
    before = ""
    for i, content in enumerate(contents):
        # The end of a turn is found by rendering the conversation up to it.
        rendered = write(contents[: i + 1])
        own = f"{MARK}{i}/[0-9]+{MARK}" + (f"|{IMAGE_TOKEN}" if IMAGE_TOKEN in content else "")
        pieces = re.split(f"({own})", rendered.removeprefix(before))
        gaps, found = pieces[::2], pieces[1::2]
        if not rendered.startswith(before) or set(found) != set(content):
            raise UserError("the tokenizer's chat template does not write each turn after the ones before it")
        if found != content or MARK in "".join(gaps):
            raise changed
        around.append(gaps)
        before = rendered

    padded = [[item if item == IMAGE_TOKEN else f" \n{item}\n " for item in content] for content in contents]
    rendered = write(padded)
    frames, written = [], ""
    for shape, content, pads, gaps in zip(shapes, contents, padded, around, strict=True):
        texts = [pad for pad in pads if pad != IMAGE_TOKEN]
        strips = bool(texts) and not any(text in rendered for text in texts)
        kept = content if strips else pads
        written += "".join(gap + item for gap, item in zip(gaps, [*kept, ""], strict=True))
        frames.append(Frame(gaps[0], gaps[-1], strips, tuple(gaps[1:-1]) if shape else None))
    if rendered != written:
        raise changed
    return frames


@contextmanager
def _limited() -> Iterator[None]:
    """Limit time and memory of a template; the sandbox of transformers does not limit nested loops or text sizes.

    Timers need the main thread, which renders each template first. Memory limits apply to the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*unused: Any) -> NoReturn:
        raise TimeoutError(f"it takes more than {MAX_SECONDS:g} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    if sys.platform == "linux":
        limit = psutil.Process().memory_info().vms + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit if soft < 0 else min(limit, soft), hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _item(text: str) -> dict[str, Any]:
    return {"type": "image"} if text == IMAGE_TOKEN else {"type": "text", "text": text}
