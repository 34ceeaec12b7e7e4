"""A chat session in the terminal, or with questions from a pipe."""

import shlex
import sys
from collections.abc import Iterator, Sequence

from umbrella.base import UserError, printable
from umbrella.conversations.schema import ImageItem
from umbrella.inference.model import Umbrella

HELP = """Ask, a line each. /add FILE [MODALITY] shows a volume with the next question; an empty line or Ctrl-D ends."""


def run_chat(model: Umbrella, volumes: Sequence[ImageItem], max_new_tokens: int | None) -> None:
    """Answer the lines of standard input until an empty line or its end.

    At a terminal, errors are printed and the session continues. With a pipe, the first error ends it.

    Args:
        volumes: shown with the first question.

    Raises:
        UserError: as ``Chat.ask`` and ``Umbrella.items``; not at a terminal.
    """
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401  # line editing and history

        print(HELP)
    chat, pending = model.chat(), list(volumes)
    for line in _read_lines(at_terminal, pending):
        try:
            if line.startswith("/"):
                pending += _add_volume(model, line)
                continue
            paths, modalities = [v.image_path for v in pending], [v.modality for v in pending]
            pending.clear()  # also if the question fails: a faulty volume would block all further questions
            print(printable(chat.ask(line, paths, modalities, max_new_tokens)), flush=True)
        except UserError as error:
            if not at_terminal:
                raise
            message = printable(str(error))
            print(f"error: {message}; this line was ignored; correct it, and add its volumes again", file=sys.stderr)


def _read_lines(at_terminal: bool, pending: Sequence[ImageItem]) -> Iterator[str]:
    while True:
        count = f"[{len(pending)} volume{'s' if len(pending) > 1 else ''}] " if pending else ""
        try:
            line = input(f"{count}> " if at_terminal else "").strip()
        except EOFError:
            if at_terminal:
                print()
            return
        if not line:
            return
        yield line


def _add_volume(model: Umbrella, line: str) -> list[ImageItem]:
    try:
        command, *words = shlex.split(line)
    except ValueError as error:
        raise UserError(f"{line}: {str(error).lower()}") from None
    if command != "/add" or len(words) not in (1, 2):
        raise UserError(f"{line}: write /add FILE, or /add FILE MODALITY, with quotes around blanks")
    return model.items(words[0], words[1] if len(words) == 2 else None)
