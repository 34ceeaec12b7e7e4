"""What every room stands on: the base of all settings and the two kinds of exception that end a script in one line."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

QUERY = re.compile(
    r"(?i)(?<![\w./-])(?!ssl[_-]?key=)([\w.-]*(?:passw|pwd|token|secret|credential)[\w.-]*"
    r"|(?:[\w.-]*[_.-])?(?:api|access|account|private)?key(?:[_.-][\w.-]*)?|[\w.-]*sig(?:nature)?|sas)=[^&\s]+"
)
"""A secret that stands in an address by its name: password=..., secret_key=..., sig=...; ssl_key names a file."""
PASSWORD = re.compile(r"://[^/?#\s:@]*:(?!\d+(?:[/?#\s]|$))\S*@")
"""One behind a user's name, were there a slash in it; a port is none."""
TOKEN = re.compile(r"(?i)https?://[^/?#\s]+@")
"""One in the place of the name. In other addresses a name alone is no secret."""

UNPRINTABLE = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|\r(?!\n)")
"""Control characters, escape sequences begin with one, and those that reverse the direction of a text."""


ProgressBar = Callable[[Sequence, str], Iterable]
"""A progress bar: takes things and a description of the work, returns the same things and advances as they are read."""


class Section(BaseModel):
    """A frozen group of settings. The docstring under a field is its line in ``--help``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Stopped(Exception):
    """A script was asked to stop by SIGTERM, and did, with everything saved. The message says how it goes on.

    Scripts print it and exit with status 143, as a process that SIGTERM ended.
    """


class UserError(Exception):
    """Something the person running a script can put right.

    The message is whole: what is wrong, where, and the remedy. Scripts print it without a traceback and exit with
    status 2. Several problems found together are several lines of one message.
    """


def printable(text: str) -> str:
    """A text with its control characters written as codes, such as ``\\x1b``. Line breaks and tabs are kept."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def pluralise(number: int, what: str) -> str:
    """Return a number with its noun in the singular or plural: "1 sample", "2 samples"."""
    return f"{number} {what}" + ("s" if number != 1 else "")


def note(words: object) -> None:
    """Print a note on standard error."""
    print(f"note: {printable(str(words))}", file=sys.stderr, flush=True)


def masked(text: str) -> str:
    """A text, such as an address or an error about one, without the credentials in it."""
    text = PASSWORD.sub("://***@", QUERY.sub(r"\1=***", text))
    return re.sub(r"://[^/\s]*@", "://***@", text)


def loading_fault(error: Exception) -> str:
    """Why transformers cannot load a part of a checkpoint, in one line."""
    if "trust_remote_code" in str(error):
        return "it needs Python code that comes with it, which is never run; use a checkpoint of a kind known here"
    return " ".join(str(error).split())[:300]


def without_secret(address: str, instead: str) -> str:
    """An address, for a setting.

    Args:
        instead: where what is secret belongs: "set NAME".

    Raises:
        ValueError: there is a secret in it.
    """
    place, _, query = address.partition("?")  # a folder may be named key=1
    if "://" in place and (QUERY.search(query) or PASSWORD.search(address) or TOKEN.search(address)):
        raise ValueError(
            "settings are written to many places, so they hold no password, token or key; leave it out and " + instead
        )
    return address


def _place(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"there is no home folder {path.split('/')[0]}; write ./{path} for a name that begins with ~")
    return without_secret(
        expanded,
        "have it where the address's library looks: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or"
        " ~/.aws/credentials, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, or what fsspec's package for it reads",
    )


Place = Annotated[str, AfterValidator(_place)]
"""A setting that names a file, a folder or an address: ``~`` is expanded, and an address holds no secret."""
