"""Base class of settings, exceptions and signals that end a script, and helpers for messages."""

import os
import re
import reprlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

QUERY = re.compile(
    r"(?i)(?<![\w./-])(?!ssl[_-]?key=)([\w.-]*(?:passw|pwd|token|secret|credential)[\w.-]*"
    r"|(?:[\w.-]*[_.-])?(?:api|access|account|private)?key(?:[_.-][\w.-]*)?|[\w.-]*sig(?:nature)?|sas)=[^&\s]+"
)
"""A named secret in an address: password=..., secret_key=..., sig=...; ssl_key is the name of a file."""
PASSWORD = re.compile(r"://[^/?#\s:@]*:(?!\d+(?:[/?#\s]|$))\S*@")
"""A password after a user name, even with a slash in it. A port is no password."""
TOKEN = re.compile(r"(?i)https?://[^/?#\s]+@")
"""A token in place of a user name. In addresses other than http a user name alone is no secret."""

UNPRINTABLE = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|\r(?!\n)")
"""Control characters, with which escape sequences begin, and characters that reverse the direction of a text."""

ProgressBar = Callable[[Sequence, str], Iterable]
"""A function of (items, description) that returns the items and shows how many were read."""


def no_progress(items: Sequence, description: str) -> Iterable:
    """Return the items; show nothing."""
    return items


class Section(BaseModel):
    """A frozen group of settings. The docstring under a field is its line in ``--help``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Stopped(Exception):
    """A script stopped after SIGTERM, and its state is saved. The message says how to resume it.

    Scripts print the message and exit with status 143, as a process that SIGTERM ended.
    """


class UserError(Exception):
    """An error that the user can correct.

    The message states the problem, its place and the remedy. Scripts print it without a traceback and exit with
    status 2. Several problems are several lines of one message.
    """


@contextmanager
def on_sigterm(action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` at the first SIGTERM in this context. A second one has the effect that it has outside.

    ``action`` may raise ``Stopped``. Outside of the main thread, which alone receives signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    outcome: list[Stopped] = []

    def handle(*unused: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        try:
            action()
        except Stopped as stopped:
            outcome.append(stopped)
            raise KeyboardInterrupt from None  # Ray loses any other exception while it waits

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except KeyboardInterrupt:
        if outcome:
            raise outcome[0] from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def printable(text: str) -> str:
    """Replace control characters by their codes, such as ``\\x1b``. Line breaks and tabs are kept."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def pluralise(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural: "1 sample", "2 samples"."""
    return f"{number} {noun}" + ("s" if number != 1 else "")


class _JsonRepr(reprlib.Repr):
    """Shortened representation with JSON's literals; ``reprlib`` selects methods by the name of the type."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = 300

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"


def format_value(value: object) -> str:
    """Format a value for a message: one line, shortened, JSON literals, texts in quotes."""
    return _JsonRepr().repr(value)[:300]


def format_name(name: str) -> str:
    """Format a name or path for a message; quotes are added only if necessary."""
    return name if name and name.isprintable() and len(name) < 300 else format_value(name)


def note(message: object) -> None:
    """Print a note on standard error."""
    print(f"note: {printable(str(message))}", file=sys.stderr, flush=True)


def mask_secrets(text: str) -> str:
    """Replace the credentials in a text, such as an address or an error message, by ``***``."""
    text = PASSWORD.sub("://***@", QUERY.sub(r"\1=***", text))
    return re.sub(r"://[^/\s]*@", "://***@", text)


def describe_load_error(error: Exception) -> str:
    """Describe in one line why transformers cannot load a part of a checkpoint."""
    if "trust_remote_code" in str(error):
        return "it needs Python code that comes with it, which is never run; use a checkpoint of a kind known here"
    return " ".join(str(error).split())[:300]


def reject_secrets(address: str, remedy: str) -> str:
    """Return an address that is the value of a setting, unless it contains credentials.

    Args:
        remedy: where to give the credentials instead, such as "set NAME".

    Raises:
        ValueError: the address contains credentials.
    """
    path, _, query = address.partition("?")  # a folder may be named key=1
    if "://" in path and (QUERY.search(query) or PASSWORD.search(address) or TOKEN.search(address)):
        raise ValueError(
            "settings are written to many places, so they hold no password, token or key; leave it out and " + remedy
        )
    return address


def _check_path(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"there is no home folder {path.split('/')[0]}; write ./{path} for a name that begins with ~")
    return reject_secrets(
        expanded,
        "have it where the address's library looks: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or"
        " ~/.aws/credentials, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, or what fsspec's package for it reads",
    )


PathOrAddress = Annotated[str, AfterValidator(_check_path)]
"""Type of a setting that is a path or an address. ``~`` is expanded; an address with credentials is rejected."""
