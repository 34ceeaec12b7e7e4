"""Subjects without their ids: the same subject has the same hash in one storage, and another one elsewhere."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from umbrella.paths import salt_file


def read_salt(storage: str | Path) -> str:
    """The storage's salt, made when missing, for its owner's eyes only. Whoever has it can test ids for a hash."""
    path = salt_file(storage)
    if not path.exists():
        own = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with os.fdopen(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(own, path)  # the first one counts
        except FileExistsError:
            pass
        finally:
            own.unlink()
    return path.read_text()


def hashed(subject: str, salt: str) -> str:
    """A subject's stand-in: HMAC-SHA256 of its id under the salt, 64 bits of it."""
    return "subject-" + hmac.new(salt.encode(), subject.encode(), hashlib.sha256).hexdigest()[:16]


def hide(text: str, subjects: Iterable[str], salt: str) -> str:
    """A text with the ids of these subjects hashed wherever they stand as words of their own."""
    ids = sorted(filter(None, set(subjects)), key=len, reverse=True)
    if not ids:
        return text
    words = "|".join(map(re.escape, ids))
    return re.sub(rf"(?<![0-9A-Za-z])(?:{words})(?![0-9A-Za-z])", lambda found: hashed(found[0], salt), text)
