"""What a chat template writes around the contents of turns.

The template is rendered once with a private mark in place of each text. What stands between the marks is, letter for
letter, what the template writes around them.
"""

import re
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from transformers import PreTrainedTokenizerBase

from umbrella.base import UserError
from umbrella.data.segments import MARK
from umbrella.data.tokenizer import IMAGE_TOKEN

EXACT = 16
"""Turns up to which every beginning of a conversation is rendered: work that grows as the square of the turns."""
SECONDS, MEMORY = 2.0, 1 << 30
"""Processor time and bytes that rendering a template once may take."""
STATM = Path("/proc/self/statm")
"""Where Linux says how much memory this process has mapped."""


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
    # One by one in short conversations; in long ones, turns of one shape together.
    groups: Sequence[object] = range(len(turns)) if len(turns) <= EXACT else turns
    for group in dict.fromkeys(groups):
        given = [turn if own == group else old for own, turn, old in zip(groups, turns, known, strict=True)]
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
    # Where a turn ends is seen where it is the last one. After EXACT turns, a turn that is written like an earlier one
    # of its kind ends like that one. The check against the whole conversation at the end covers both.
    def write(contents: Sequence[Sequence[str]]) -> str:
        messages = [
            {"role": role, "content": content[0] if as_text else [_item(text) for text in content]}
            for role, content in zip(roles, contents, strict=False)
        ]
        try:
            with _bounded():
                return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception as error:  # whatever the template's own expressions raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"the tokenizer's chat template refuses turns of {', '.join(roles)}: {reason}") from None

    kinds = [shape.items if shape else ("text",) for shape in shapes]
    contents = [
        [IMAGE_TOKEN if kind == "image" else f"{MARK}{i}/{j}{MARK}" for j, kind in enumerate(turn)]
        for i, turn in enumerate(kinds)
    ]
    changed = UserError(
        "the tokenizer's chat template changes what turns say, or says it twice; all it may do is strip the blanks on"
        " both sides"
    )
    whole = write(contents) if len(contents) > EXACT else ""
    around: list[list[str]] = []
    like: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}  # what was written around an earlier turn of this kind
    before = ""
    for i, content in enumerate(contents):
        kind = (roles[i - 1] if i else "", roles[i], kinds[i])
        if EXACT <= i < len(contents) - 1 and kind in like:
            turn = "".join(gap + item for gap, item in zip(like[kind], [*content, ""], strict=True))
            if whole.startswith(turn, len(before)):
                around.append(like[kind])
                before += turn
                continue
        rendered = write(contents[: i + 1])
        own = f"{MARK}{i}/[0-9]+{MARK}" + (f"|{IMAGE_TOKEN}" if IMAGE_TOKEN in content else "")
        pieces = re.split(f"({own})", rendered.removeprefix(before))
        gaps, found = pieces[::2], pieces[1::2]
        if not rendered.startswith(before) or set(found) != set(content):
            raise UserError("the tokenizer's chat template does not write each turn after the ones before it")
        if found != content:
            raise changed
        around.append(gaps)
        like[kind] = gaps
        before = rendered

    padded = [[item if item == IMAGE_TOKEN else f" \n{item}\n " for item in content] for content in contents]
    rendered = write(padded)
    kept_blanks = set(re.findall(f"(?<= \n){MARK}[0-9]+/[0-9]+{MARK}(?=\n )", rendered))
    frames = []
    written = []
    for shape, content, pads, gaps in zip(shapes, contents, padded, around, strict=True):
        texts = [item for item in content if item != IMAGE_TOKEN]
        strips = bool(texts) and not kept_blanks.intersection(texts)
        kept = content if strips else pads
        written += [gap + item for gap, item in zip(gaps, [*kept, ""], strict=True)]
        frames.append(Frame(gaps[0], gaps[-1], strips, tuple(gaps[1:-1]) if shape else None))
    marks = re.findall(f"{MARK}[0-9]+/[0-9]+{MARK}", "".join(written))
    if rendered != "".join(written) or len(marks) > len(set(marks)):
        raise changed
    return frames


@contextmanager
def _bounded() -> Iterator[None]:
    """Bound what a template may take: transformers' sandbox bounds one range, but no nested loops and no texts.

    Limits are those of the process and timers need the main thread, which renders each template first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*unused: Any) -> NoReturn:
        raise TimeoutError(f"it takes more than {SECONDS:g} s")

    limit = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    if STATM.exists():
        most = int(STATM.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most if limit[0] < 0 else min(most, limit[0]), limit[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limit)


def _item(text: str) -> dict[str, Any]:
    return {"type": "image"} if text == IMAGE_TOKEN else {"type": "text", "text": text}
