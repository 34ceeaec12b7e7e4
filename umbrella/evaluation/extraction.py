"""Extract the answer from generated text: the label of a class, or a number."""

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
    r"(?<![\w.^])(?<!\^-)(?<![^\W\d_]-)"  # not part of a name (T1, sub-0007) or an exponent (m^-2)
    r"((?:(?<![\w-])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?)"
    r"(?!\.?\d)(?!(?:st|nd|rd|th|d)(?!\w))",  # not the start of a date or version, nor 2nd or 3D
    re.IGNORECASE,
)


def extract_answer(text: str, candidates: Mapping[str, str], number: bool) -> str | float | None:
    """Extract the only answer of a text; None if there is none, or several different ones.

    Numbers: the only number, with any unit; it may be repeated. Thousands may have commas (1,234.5). A range (43-45),
    two units (43 years and 6 months) and a number in words give None, because their meaning is ambiguous. Digits of a
    name or an exponent (T1, sub-0007, m2) and ordinals are not numbers.

    Classes: a label or the text of its candidate, as whole words, without regard to case and punctuation. If the words
    of one label are part of another, only the longer one counts ("mild" in "very mild"). A clause (up to the next
    comma, colon or stop) with a negation gives no label: "not male" is None, and not the other class. Negations that
    are words of a label ("not demented", "no") belong to the label.

    Args:
        candidates: label to answer text; not used for numbers.
        number: whether the labels of the target are numbers.
    """
    if number:
        return _number(text)
    whole = text.strip().casefold()
    exact = {label for label, answer in candidates.items() if whole in (label.casefold(), answer.strip().casefold())}
    if len(exact) == 1:  # also separates labels that differ by punctuation alone: "amyloid+", "amyloid-"
        return exact.pop()
    return _label(text, candidates)


def _number(text: str) -> float | None:
    numbers = {float(match.replace(",", "")) for match in NUMBER.findall(text.translate(DASHES))}
    return numbers.pop() if len(numbers) == 1 and all(map(isfinite, numbers)) else None


def _label(text: str, candidates: Mapping[str, str]) -> str | None:
    words, clauses = _words(text)
    phrases = {(label, tuple(_words(phrase)[0])) for label, answer in candidates.items() for phrase in (label, answer)}
    found = [(start, start + len(p), label) for label, p in phrases if p for start in _places(p, words)]
    kept = [
        (start, end, label)
        for start, end, label in found
        if not any(a <= start and end <= b and b - a > end - start for a, b, _ in found)
    ]
    used = {i for start, end, _ in kept for i in range(start, end)}
    denied = {clauses[i] for i, word in enumerate(words) if i not in used and NEGATION.fullmatch(word)}
    if any(clauses[i] in denied for i in used):
        return None
    labels = {label for _, _, label in kept}
    return labels.pop() if len(labels) == 1 else None


def _words(text: str) -> tuple[list[str], list[int]]:
    """The words of a text, and the number of the clause of each word."""
    words: list[str] = []
    clauses: list[int] = []
    clause = 0
    for token in WORD.findall(APOSTROPHES.sub("", text.translate(DASHES)).casefold()):
        if token in BREAKS:
            clause += 1
        else:
            words.append(token)
            clauses.append(clause)
    return words, clauses


def _places(phrase: tuple[str, ...], words: list[str]) -> Iterator[int]:
    size = len(phrase)
    return (start for start in range(len(words) - size + 1) if tuple(words[start : start + size]) == phrase)
