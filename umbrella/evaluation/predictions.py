"""Extract answers from generated text; predictions, their files, and their aggregation over a subject."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from math import fsum, isfinite, log
from pathlib import Path
from typing import Any

import numpy as np

from umbrella.conversations.schema import Conversation, read_candidates
from umbrella.fileio import write_atomic

SMALLEST = 1e-300
"""Probability that stands for 0 in a logarithm."""


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for one conversation, with its truth. All metrics are computed from these.

    A model answers in two ways: by ``probabilities`` of candidate answers, and by generated ``text``, in which
    ``predicted`` is found. Either may be missing.
    """

    task_id: str
    task_type: str
    subject_id: str
    target: str
    """What the label is a value of, such as "sex"."""
    label: str | float | None
    """The true class or number; None for free text."""
    truth: str
    """The text of the true answer."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Metadata of the conversation, such as site, sex, age, comparison_type, reference_label."""
    volumes: tuple[tuple[str, str], ...] = ()
    """(modality, path) of each volume, in reading order."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """Label to probability over the candidates of the target; empty if it has none."""
    numbers: tuple[float, ...] = ()
    """The grid of a numeric target, ascending: the numbers whose likelihood was computed; empty: not scored."""
    number_probabilities: tuple[float, ...] = ()
    """The probability of each of ``numbers``; the sum is 1."""
    answer_nll: float | None = None
    """Negative log likelihood of the true answer in nats, summed over ``answer_tokens``; None: not measured."""
    answer_tokens: int = 0
    text: str | None = None
    """The generated answer; None: none was generated."""
    cut: bool = False
    """Whether ``text`` reached the limit of tokens before it ended."""
    predicted: str | float | None = None
    """The label or number found in ``text``; None: there is none (invalid), or the answer is free text. Files call it
    "said"."""
    subjects: tuple[str, ...] = ()
    """All subjects of the conversation, including the reference."""
    conversation_id: str = ""
    """See ``Conversation.conversation_id``."""

    @classmethod
    def from_conversation(cls, conversation: Conversation, truth: bool = True) -> "Prediction":
        """A prediction without an answer. ``truth=False``: the true answer is left out."""
        return cls(
            task_id=conversation.task_id,
            task_type=conversation.task_type,
            subject_id=conversation.subject_id,
            target=conversation.target,
            label=conversation.label,
            truth=conversation.answer if truth else "",
            metadata=conversation.metadata,
            volumes=tuple((volume.modality, volume.image_path) for volume in conversation.volumes),
            subjects=tuple(sorted(conversation.subjects)),
            conversation_id=conversation.conversation_id,
        )

    @property
    def candidates(self) -> dict[str, str]:
        """See ``Conversation.candidates``."""
        return read_candidates(self.metadata)

    @property
    def answer(self) -> str | float | None:
        """The answer by likelihood, the most likely label or the median of the numbers; otherwise ``predicted``."""
        if self.numbers:
            return self.number_quantile(0.5)
        return most_likely(self.probabilities) if self.probabilities else self.predicted

    def number_quantile(self, share: float) -> float:
        """The smallest of ``numbers`` below or at which there is at least this share of the probability."""
        at = int(np.searchsorted(np.cumsum(self.number_probabilities), share - 1e-9))  # sums have rounding errors
        return self.numbers[min(at, len(self.numbers) - 1)]

    @property
    def number_interval(self) -> tuple[float, float]:
        """The 5% and 95% quantiles of the distribution of the number."""
        return self.number_quantile(0.05), self.number_quantile(0.95)

    @property
    def number_mean(self) -> float:
        """The expected value of the distribution of the number."""
        return float(np.dot(self.numbers, self.number_probabilities))

    @property
    def number_nll(self) -> float:
        """The negative log likelihood, in nats, of the number of the grid that is nearest to the label."""
        nearest = int(np.argmin(np.abs(np.array(self.numbers) - float(self.label or 0))))
        return -log(max(self.number_probabilities[nearest], SMALLEST))

    @property
    def nll_per_token(self) -> float | None:
        """Nats per token of the true answer; None: not measured."""
        return None if self.answer_nll is None else self.answer_nll / self.answer_tokens

    def to_json(self) -> str:
        """One line of JSON."""
        fields = {("said" if name == "predicted" else name): value for name, value in asdict(self).items()}
        return json.dumps(fields, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Prediction":
        """The inverse of ``to_json``."""
        raw = json.loads(line)
        raw |= {"volumes": tuple(map(tuple, raw["volumes"])), "subjects": tuple(raw.get("subjects", ()))}
        raw |= {name: tuple(raw.get(name, ())) for name in ("numbers", "number_probabilities")}
        raw["predicted"] = raw.pop("said")
        return cls(**raw)


def write_predictions(file: Path, predictions: Iterable[Prediction]) -> None:
    """Write predictions as JSON Lines, atomically."""
    write_atomic(file, "".join(f"{prediction.to_json()}\n" for prediction in predictions))


def read_predictions(file: Path) -> list[Prediction]:
    """Read the file of ``write_predictions``."""
    with file.open(encoding="utf-8") as lines:
        return [Prediction.from_json(line) for line in lines]


def cut_note(cut: int, answers: int) -> str:
    """A note on the number of generated answers that were cut; empty if none was."""
    if not cut:
        return ""
    return f"{cut} of {answers} generated answers were cut before they ended; raise evaluate.max_new_tokens"


def most_likely(probabilities: Mapping[str, float]) -> str | None:
    """The label of the highest probability; None for a tie or without labels."""
    best = max(probabilities.values(), default=0)
    labels = [label for label, probability in probabilities.items() if probability == best]
    return labels[0] if len(labels) == 1 else None


def mean_over_subjects(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Aggregate over subjects: one prediction per subject and label, whose other fields are those of its first one.

    A prediction with candidates of its own stays as it is: other questions have other candidates.

    ``probabilities`` and ``number_probabilities`` are means, and ``predicted`` is the mean of the generated numbers,
    otherwise the most likely label.
    """
    subjects = []
    for group in _by_subject(predictions):
        scored = [p.probabilities for p in group if p.probabilities]
        sums = {name: fsum(one.get(name, 0.0) for one in scored) for name in dict.fromkeys(chain(*scored))}
        # Rounded: values that differ only by rounding errors are ties, between labels and between subjects in an AUC.
        mean = {label: round(total / len(scored), 12) for label, total in sums.items()}
        numbers = [p.predicted for p in group if isinstance(p.predicted, int | float)]
        predicted = fsum(numbers) / len(numbers) if numbers else most_likely(mean)
        grids = [p.number_probabilities for p in group if p.numbers]
        mixture = tuple(float(x) for x in np.mean(grids, axis=0)) if grids else ()
        subjects.append(replace(group[0], probabilities=mean, number_probabilities=mixture, predicted=predicted))
    return subjects


def conversations_with_labels(predictions: Iterable[Prediction]) -> list[list[Prediction]]:
    """The predictions of each conversation with several class labels, if there is one for each of these labels."""
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for p in predictions:
        if isinstance(p.label, str) and p.conversation_id not in ("", p.task_id):
            groups[p.conversation_id].append(p)
    numbers = (sum(isinstance(entry["label"], str) for entry in of[0].metadata["labels"]) for of in groups.values())
    return [of for of, number in zip(groups.values(), numbers, strict=True) if len(of) == number > 1]


def majority_vote(predictions: Iterable[Prediction]) -> tuple[list[Prediction], int]:
    """Aggregate over subjects: the most frequent label that is predicted for a subject; a tie is no answer.

    Returns:
        (one prediction per subject and label, without probabilities; number of ties).
    """
    subjects, ties = [], 0
    for group in _by_subject(predictions):
        votes = Counter(p.predicted for p in group if p.predicted is not None).most_common(2)
        tie = len(votes) == 2 and votes[0][1] == votes[1][1]
        ties += tie
        subjects.append(replace(group[0], probabilities={}, predicted=votes[0][0] if votes and not tie else None))
    return subjects, ties


def subject_answers(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Aggregate over subjects: the answers of the main metric, by likelihood if there is any, otherwise generated.

    ``predicted`` is the label (None: no valid answer) or the number (subjects without one are left out). Predictions
    with candidates of their own are left out, as their labels do not mean the same in all questions.
    """
    given = [p for p in predictions if p.probabilities or p.numbers or p.text is not None or p.predicted is not None]
    given = [p for p in given if not p.candidates]
    given = [p for p in given if isinstance(p.label, str) == isinstance(given[0].label, str)]  # not classes and numbers
    scored = [p for p in given if p.probabilities or p.numbers]
    if not scored and any(isinstance(p.label, str) for p in given):
        return majority_vote(given)[0]
    answers = [replace(p, predicted=p.answer) for p in mean_over_subjects(scored or given)]
    return [p for p in answers if isinstance(p.label, str) or p.predicted is not None]


def _by_subject(predictions: Iterable[Prediction]) -> Iterable[Sequence[Prediction]]:
    """The predictions of each subject; one group for each of its labels, and for each question with candidates."""
    groups: dict[Any, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        question = prediction.task_id if prediction.candidates else None
        groups[prediction.subject_id, prediction.label, question].append(prediction)
    return groups.values()


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


def extract_answer(text: str, candidates: Mapping[Any, str], number: bool) -> str | float | None:
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
