"""A conversation with a model in the terminal, or with lines from a pipe."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from umbrella.base import UserError, printable
from umbrella.conversations.schema import ImageItem
from umbrella.inference.model import Umbrella

HELP = """Ask, a line each. /add FILE [MODALITY] shows a volume with the next question; an empty line or Ctrl-D ends."""


def converse(model: Umbrella, shown: Sequence[ImageItem], max_new_tokens: int | None) -> None:
    """Answer lines of standard input until an empty one or its end; the first question is about the volumes ``shown``.

    At a terminal, what is wrong is said and the conversation goes on. From a pipe nobody could put it right:

    Raises:
        UserError: as ``Chat.ask`` and ``Umbrella.items``.
    """
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401  # lines can be edited, and those before come back

        print(HELP)
    chat, waiting = model.chat(), list(shown)

    def take(line: str) -> None:
        if line.startswith("/"):
            waiting.extend(_added(model, line))
            return
        volumes, modalities = [v.image_path for v in waiting], [v.modality for v in waiting]
        waiting.clear()  # also if it fails: what is wrong with one of them would stand in the way of all questions
        print(printable(chat.ask(line, volumes, modalities, max_new_tokens)), flush=True)

    for line in _lines(at_terminal, waiting):
        with _said_at_terminal() if at_terminal else nullcontext():
            take(line)


@contextmanager
def _said_at_terminal() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        said = printable(str(error))
        print(f"error: {said}; this line did nothing, so put it right, with its volumes", file=sys.stderr)


def _lines(at_terminal: bool, waiting: Sequence[ImageItem]) -> Iterator[str]:
    while True:
        count = f"[{len(waiting)} volume{'s' if len(waiting) > 1 else ''}] " if waiting else ""
        try:
            line = input(f"{count}> " if at_terminal else "").strip()
        except EOFError:
            if at_terminal:
                print()
            return
        if not line:
            return
        yield line


def _added(model: Umbrella, line: str) -> list[ImageItem]:
    try:
        command, *words = shlex.split(line)
    except ValueError as error:
        raise UserError(f"{line}: {str(error).lower()}") from None
    if command != "/add" or len(words) not in (1, 2):
        raise UserError(f"{line}: write /add FILE, or /add FILE MODALITY, with quotes around blanks")
    return model.items(words[0], words[1] if len(words) == 2 else None)
