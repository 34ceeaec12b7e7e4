"""Extraction of the text that a chat template adds around the contents of turns.

The template is rendered with a private-use marker in place of each text; the template's own text is what is between the
markers.
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

MAX_EXACT_TURNS = 16
"""Every prefix of a conversation is rendered up to this number of turns; the work is quadratic."""
MAX_SECONDS, MAX_BYTES = 2.0, 1 << 30
"""Limits on processor time and memory for rendering a template once."""
STATM = Path("/proc/self/statm")
"""Linux reports the mapped memory of the process here."""


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


def turn_frames(tokenizer: PreTrainedTokenizerBase, template: str, turns: Sequence[TurnShape]) -> list[Frame]:
    """Return the frame of each turn. A template may take contents as texts or as lists of items.

    If the template takes items, keeps their order and writes images as ``<image>``, it gets the items of the turn.
    Otherwise it gets the content as one text item, which keeps the order.

    Raises:
        UserError: the template does not write turns one after another, refuses these roles, or changes contents.
    """
    roles = [turn.role for turn in turns]
    known: list[TurnShape | None] = [None] * len(turns)  # None: content as one text
    try:
        return _read_frames(tokenizer, template, roles, known, as_text=True)
    except UserError as error:
        # Templates of processors take items and ignore strings.
        with suppress(UserError):
            return _read_frames(tokenizer, template, roles, turns)
        try:
            frames = _read_frames(tokenizer, template, roles, known)
        except UserError:
            raise error from None
    # Turns are tried one by one in short conversations, and together by shape in long ones.
    groups: Sequence[object] = range(len(turns)) if len(turns) <= MAX_EXACT_TURNS else turns
    for group in dict.fromkeys(groups):
        given = [turn if own == group else old for own, turn, old in zip(groups, turns, known, strict=True)]
        with suppress(UserError):
            frames = _read_frames(tokenizer, template, roles, given)
            known = given
    return frames


def _read_frames(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    roles: Sequence[str],
    shapes: Sequence[TurnShape | None],
    as_text: bool = False,
) -> list[Frame]:
    # The end of a turn is found by rendering the conversation up to it. After MAX_EXACT_TURNS turns, the text around an
    # earlier turn of the same kind is reused if it matches. The final check on the whole conversation covers both.
    def write(contents: Sequence[Sequence[str]]) -> str:
        messages = [
            {"role": role, "content": content[0] if as_text else [_item(text) for text in content]}
            for role, content in zip(roles, contents, strict=False)
        ]
        try:
            with _limited():
                return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception as error:  # a template can raise anything
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
    whole = write(contents) if len(contents) > MAX_EXACT_TURNS else ""
    around: list[list[str]] = []
    seen: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}  # text around an earlier turn of this kind
    before = ""
    for i, content in enumerate(contents):
        kind = (roles[i - 1] if i else "", roles[i], kinds[i])
        if MAX_EXACT_TURNS <= i < len(contents) - 1 and kind in seen:
            turn = "".join(gap + item for gap, item in zip(seen[kind], [*content, ""], strict=True))
            if whole.startswith(turn, len(before)):
                around.append(seen[kind])
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
        seen[kind] = gaps
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
def _limited() -> Iterator[None]:
    """Limit time and memory of a template; the sandbox of transformers does not limit nested loops or text sizes.

    Timers need the main thread, which renders each template first. Memory limits apply to the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*unused: Any) -> NoReturn:
        raise TimeoutError(f"it takes more than {MAX_SECONDS:g} s")

    limit = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    if STATM.exists():
        most = int(STATM.read_text().split()[0]) * resource.getpagesize() + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most if limit[0] < 0 else min(most, limit[0]), limit[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limit)


def _item(text: str) -> dict[str, Any]:
    return {"type": "image"} if text == IMAGE_TOKEN else {"type": "text", "text": text}
