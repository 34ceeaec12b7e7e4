"""Candidate answers of a target: one text for each class, or for each number of a grid."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, floor, log10

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation, most_frequent_answers, questions_of

Candidates = Mapping[str, Mapping[str, str] | Mapping[float, str]]
"""Target to label to answer text: {"sex": {"female": "female.", "male": "male."}, "age": {20.0: "20 years.", ...}}."""
MAX_GRID = 200
"""Largest number of steps of a grid that is derived from labels."""
DIGITS = re.compile(r"-?\d+(?:\.(\d+))?")


def find_candidates(
    conversations: Iterable[Conversation], grids: Mapping[str, Sequence[float]] = {}
) -> dict[str, Mapping[str, str] | Mapping[float, str]]:
    """The candidates of each target, with the most frequent answer text of each class and of all numbers.

    Conversations with candidates of their own are left out, and so are classes if there is one only.

    Args:
        conversations: those of the training split.
        grids: numeric target to (lowest number, highest number, step). Without it, the grid has the range and the
            decimals of the labels, and a larger step if it has more than ``MAX_GRID`` steps.

    Raises:
        UserError: a grid is of a target without numbers.
    """
    questions = [c for c in questions_of(conversations) if c.label is not None and not c.candidates]
    if unknown := sorted(grids.keys() - find_numbers(questions)):
        raise UserError(
            f"evaluate.number_grids: {', '.join(unknown)}: data.train has no numbers of it; it has numbers of"
            f" {', '.join(sorted(find_numbers(questions))) or 'nothing'}"
        )
    usual = most_frequent_answers(c for c in questions if isinstance(c.label, str))
    found: dict[str, Mapping[str, str] | Mapping[float, str]] = {
        target: {str(label): text for label, text in sorted(by_label.items())}
        for target, by_label in usual.items()
        if len(by_label) > 1
    }
    numeric: dict[str, list[Conversation]] = defaultdict(list)
    for c in questions:
        if not isinstance(c.label, str) and c.target not in usual:
            numeric[c.target].append(c)
    found |= {t: texts for t, of in numeric.items() if (texts := _number_texts(of, grids.get(t)))}
    return dict(sorted(found.items()))


def _number_texts(conversations: Sequence[Conversation], grid: Sequence[float] | None) -> dict[float, str]:
    """The answer text of each number of the grid; empty if no answer contains its label as digits."""
    formats: Counter[tuple[str, int, str]] = Counter()
    for c in conversations:
        places = [found for found in DIGITS.finditer(c.answer) if float(found[0]) == c.label]
        if len(places) == 1:
            start, stop = places[0].span()
            formats[c.answer[:start], len(places[0][1] or ""), c.answer[stop:]] += 1
    labels = [float(c.label or 0) for c in conversations]
    if not formats or min(labels) == max(labels):
        return {}
    (before, _, after), _ = formats.most_common(1)[0]
    decimals = max(number for _, number, _ in formats)
    if grid:
        low, high, step = grid
        decimals = max(decimals, *(len(f"{value:.6f}".rstrip("0").partition(".")[2]) for value in (low, step)))
        count = floor((high - low) / step + 1e-9) + 1
    else:
        step = 10.0**-decimals
        low, high = floor(min(labels) / step + 1e-9) * step, max(labels)
        if (high - low) / step > MAX_GRID:
            exact = (high - low) / MAX_GRID
            power = 10.0 ** floor(log10(exact))
            step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= exact)
        count = ceil((high - low) / step - 1e-9) + 1
    numbers = [round(low + i * step, 10) + 0.0 for i in range(count)]  # no -0.0
    return {number: f"{before}{number:.{decimals}f}{after}" for number in numbers}


def find_numbers(conversations: Iterable[Conversation]) -> set[str]:
    """The targets whose labels are numbers."""
    return {c.target for c in questions_of(conversations) if isinstance(c.label, int | float)}


def check_candidates(conversations: Iterable[Conversation], candidates: Candidates) -> None:
    """Check that every class label has a candidate answer.

    Raises:
        UserError: naming the first conversation whose label has none.
    """
    for conversation in questions_of(conversations):
        known = conversation.candidates or candidates.get(conversation.target, {})
        if isinstance(conversation.label, str) and conversation.label not in known:
            raise UserError(
                f"{conversation.task_id}: its label {conversation.label!r} of {conversation.target!r} does not occur in"
                f" the training data ({', '.join(map(str, known)) or 'no classes'}), so it has no candidate answer"
            )


def check_labels(candidates: Candidates) -> None:
    """Check that the labels of each target differ in their spelling and in their answers.

    Raises:
        UserError: with a line for each target that has equal labels.
    """
    errors = []
    for target, answers in candidates.items():
        spelling, texts = defaultdict(list), defaultdict(list)
        for label, text in ((label, text) for label, text in answers.items() if isinstance(label, str)):
            spelling[" ".join(label.split()).casefold()].append(label)
            texts[text.strip()].append(label)
        for groups, problem in (
            (spelling, "differ by case or blanks only; write them alike"),
            (texts, "have the same answer; give each label an answer of its own"),
        ):
            equal = [", ".join(map(repr, labels)) for labels in groups.values() if len(labels) > 1]
            if equal:
                errors.append(f"labels of {target!r}: {' and '.join(equal)} {problem}")
                break
    if errors:
        raise UserError("\n".join(errors))
