"""Find the answer in a model's own words: a label of a class, or a number."""

import re
from collections.abc import Iterator, Mapping
from math import isfinite

DASHES = str.maketrans({"\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2212": "-"})
WORD = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)+|(?<!\w)-\d+|[^\W_]+|[.,:;!?\n]")
APOSTROPHES = re.compile("['\u2019\u02bc]")
BREAKS = frozenset(".,:;!?\n")
NEGATION = re.compile(
    r"no|not|non|never|neither|nor|without|cannot|aint"
    r"|(?:is|are|was|were|do|does|did|has|have|ca|could|wo|would)nt"
)
NUMBER = re.compile(
    r"(?<![\w.^])(?<!\^-)(?<![^\W\d_]-)"  # neither of a name (T1, sub-0007) nor an exponent (m^-2)
    r"((?:(?<![\w-])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?)"
    r"(?!\.?\d)(?!(?:st|nd|rd|th|d)(?!\w))",  # neither the start of a date or version, nor 2nd or 3D
    re.IGNORECASE,
)


def said(text: str, candidates: Mapping[str, str], number: bool) -> str | float | None:
    """The one answer that a text gives; None where it gives none, or several that differ.

    Numbers: the only number there is, whatever unit follows; the same number may be said again. Thousands may have
    commas (1,234.5). A range (43-45), two units (43 years and 6 months) and a number in words are None: what is meant
    is not guessed. Digits of a name or of an exponent (T1, sub-0007, m2) and ordinals are no numbers.

    Classes: a label, or its candidate's text, as whole words, whatever their case and punctuation. Where the words of
    one lie inside those of another, only the longer is meant ("mild" in "very mild"). A label is not taken from a part
    of a sentence (up to the next comma, colon or stop) that also has a word of negation: "not male" is None, and not
    the other class. Negations that are words of a label ("not demented", "no") are part of it.

    Args:
        candidates: label to the text that says it; not looked at for numbers.
        number: the target's labels are numbers.
    """
    if number:
        return _number(text)
    whole = text.strip().casefold()
    exact = {label for label, answer in candidates.items() if whole in (label.casefold(), answer.strip().casefold())}
    if len(exact) == 1:  # also tells labels that differ by punctuation alone: "amyloid+", "amyloid-"
        return exact.pop()
    return _label(text, candidates)


def _number(text: str) -> float | None:
    numbers = {float(match.replace(",", "")) for match in NUMBER.findall(text.translate(DASHES))}
    return numbers.pop() if len(numbers) == 1 and all(map(isfinite, numbers)) else None


def _label(text: str, candidates: Mapping[str, str]) -> str | None:
    words, parts = _words(text)
    phrases = {(label, tuple(_words(way)[0])) for label, answer in candidates.items() for way in (label, answer)}
    found = [(start, start + len(p), label) for label, p in phrases if p for start in _places(p, words)]
    kept = [
        (start, end, label)
        for start, end, label in found
        if not any(a <= start and end <= b and b - a > end - start for a, b, _ in found)
    ]
    meant = {i for start, end, _ in kept for i in range(start, end)}
    denied = {parts[i] for i, word in enumerate(words) if i not in meant and NEGATION.fullmatch(word)}
    if any(parts[i] in denied for i in meant):
        return None
    labels = {label for _, _, label in kept}
    return labels.pop() if len(labels) == 1 else None


def _words(text: str) -> tuple[list[str], list[int]]:
    """The words of a text and, for each, the number of the part of a sentence that it stands in."""
    words: list[str] = []
    parts: list[int] = []
    part = 0
    for token in WORD.findall(APOSTROPHES.sub("", text.translate(DASHES)).casefold()):
        if token in BREAKS:
            part += 1
        else:
            words.append(token)
            parts.append(part)
    return words, parts


def _places(phrase: tuple[str, ...], words: list[str]) -> Iterator[int]:
    size = len(phrase)
    return (start for start in range(len(words) - size + 1) if tuple(words[start : start + size]) == phrase)
