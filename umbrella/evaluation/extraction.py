"""Stand-in until branch numbers is merged."""

import re
from collections.abc import Mapping


def said(text: str, candidates: Mapping[str, str], number: bool) -> str | float | None:
    """A label or a number in a text."""
    if number:
        found = re.search(r"-?\d+(?:\.\d+)?", text)
        return float(found[0]) if found else None
    return next((label for label, words in candidates.items() if text.strip() == words), None)
