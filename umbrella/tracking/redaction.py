"""Replace subject ids by hashes. A subject has one hash in a storage folder, and another one in another folder."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from umbrella.paths import SALT


def read_salt(storage: str | Path) -> str:
    """Read the salt of a storage folder; create it if there is none.

    Only the owner can read the file: a subject's hash can be computed from its id and the salt.
    """
    path = Path(storage) / SALT
    if not path.exists():
        with NamedTemporaryFile("w", dir=path.parent) as file, suppress(FileExistsError):  # of another process
            file.write(secrets.token_hex(32))
            file.flush()
            os.link(file.name, path)
    return path.read_text()


def hash_subject(subject: str, salt: str) -> str:
    """Hash a subject id: the first 64 bits of its HMAC-SHA256 with the salt as key."""
    return "subject-" + hmac.new(salt.encode(), subject.encode(), hashlib.sha256).hexdigest()[:16]


def redact_subjects(text: str, subjects: Iterable[str], salt: str) -> str:
    """Replace the ids of these subjects by their hashes, where they are whole words in a text."""
    ids = sorted(filter(None, set(subjects)), key=len, reverse=True)
    if not ids:
        return text
    words = "|".join(map(re.escape, ids))
    return re.sub(rf"(?<![0-9A-Za-z])(?:{words})(?![0-9A-Za-z])", lambda found: hash_subject(found[0], salt), text)
