"""What every room stands on: the base of all settings and the two kinds of exception that end a script in one line."""

import re

from pydantic import BaseModel, ConfigDict


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


def masked(text: str) -> str:
    """A text, such as an address or an error about one, without the credentials in it."""
    text = re.sub(r"://[^/\s]*@", "://***@", text)
    return re.sub(r"(?i)\b(password|token|secret)=[^&\s]+", r"\1=***", text)
