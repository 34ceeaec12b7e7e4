"""Confounds: how much of a score is explained by variables such as age, site and brain size; and external sites."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation
from umbrella.evaluation.controls import volume_owners
from umbrella.evaluation.group_metrics import Estimate, estimate
from umbrella.evaluation.metrics import main_metric, main_metric_name, ratio
from umbrella.evaluation.predictions import Prediction, subject_answers
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.volumes.store import VolumeStore

CALIPER = 0.2
"""Largest difference of matched numbers, in standard deviations (Austin, Pharmaceutical Statistics 10:150, 2011)."""
FOLDS = 5
MANY = "it has more than one category per five subjects"
Value = str | float
"""The value of a confound: a category or a number."""


@dataclass(frozen=True)
class ConfoundAnalysis:
    """The main metric of one target beside that of its confounds, over the subjects that have all of these."""

    target: str
    metric: str
    """Name of the main metric."""
    names: tuple[str, ...]
    """The confounds that are used, see ``analyse_confounds``."""
    subjects: int
    left_out: int
    """Subjects without a value of a confound."""
    model: Estimate
    confounds_alone: Estimate
    """Of a regression on the confounds that is fitted to the training split."""
    difference: Estimate
    """``model`` minus ``confounds_alone``."""
    partial: Estimate
    """Partial correlation of answer and label given the confounds."""
    coefficients: int
    """Of the regression of the partial correlation; it is undefined with less than two subjects for each."""
    matched: Mapping[str, tuple[int, Estimate]]
    """Confound to the number of matched subjects and the metric of the model over these; empty for numbers."""


@dataclass(frozen=True)
class SiteDrop:
    """The main metric of one target at sites of the training split (known) and at other ones (external)."""

    target: str
    metric: str
    subjects: tuple[int, int]
    """Number of subjects at known and at external sites."""
    known: Estimate
    external: Estimate
    difference: Estimate
    """``external`` minus ``known``."""


def brain_volumes(conversations: Iterable[Conversation], store: VolumeStore) -> dict[str, float]:
    """Return the volume in ml of the foreground of each subject's first sMRI, or other, volume that is in the store."""
    found: dict[str, float] = {}
    owners = volume_owners(conversations)
    for name in sorted(owners, key=lambda name: name != "sMRI"):
        grid, spacing = store.modalities[name].grid[:3], store.modalities[name].spacing
        for subject, (file, *_) in owners[name].items():
            with suppress(UserError):  # a file of the training split may be missing here
                if subject not in found and store.contains(file, name):
                    info = store.info(file, name)
                    view = prod(grid) * spacing**3 if spacing else prod(info.shape[:3]) * prod(info.spacing[:3])
                    found[subject] = info.foreground * view / 1000
    return found


def analyse_confounds(
    predictions: Sequence[Prediction],
    training: Iterable[Prediction],
    volumes: Mapping[str, float],
    settings: EvaluateSettings,
    seed: int = 0,
) -> tuple[ConfoundAnalysis | None, dict[str, str]]:
    """Compare a model with its confounds.

    A confound is used if most subjects have it, it is not constant, and it has at most two categories or one per
    five subjects.

    - A logistic regression (classes, of equal weight) or ridge regression (numbers) on the confounds is fitted to the
      training split. Cross-validation in this split chooses the regularisation. It is undefined if a class has one
      subject there.
    - Matching: ``match``. Matched sets are resampled as a whole.
    - Partial correlation: of label and answer, after a linear regression of both on the confounds and, for classes,
      the probabilities of the logistic regression. Classes are 0 or 1, their answers are probabilities; covariances
      are summed over classes. It is undefined with less than two subjects per coefficient.

    Args:
        predictions: of one target, with classes or numbers as labels.
        training: of the same target, without answers, one of each subject and label.
        volumes: subject to brain volume, for both splits.
        seed: of matching, cross-validation and bootstrap.

    Returns:
        (analysis, or None if no confound can be used; confound to the reason why it is not used. Confounds of the
        default settings that are missing or constant are left out of the reasons).
    """
    answers = subject_answers(predictions)
    known = [p for p in training if answers and isinstance(p.label, str) == isinstance(answers[0].label, str)]
    if not known:
        return None, {}
    columns, reasons = {}, {}
    for name in dict.fromkeys(settings.confounds):
        both = [[_value(p, name, volumes) for p in rows] for rows in (answers, known)]
        reason = _why_unused(*both)
        if not reason and name != answers[0].target:
            columns[name] = both
        elif name != answers[0].target and (reason == MANY or name not in EvaluateSettings().confounds):
            reasons[name] = reason
    tables = [list(zip(*of_split, strict=True)) for of_split in zip(*columns.values(), strict=True)]
    complete = [[i for i, row in enumerate(table) if None not in row] for table in tables]
    if not all(complete) or not complete:
        return None, reasons
    values, known_values = ([table[i] for i in used] for table, used in zip(tables, complete, strict=True))
    everyone, answers = {p.subject_id for p in answers}, [answers[i] for i in complete[0]]
    labels = [known[i].label for i in complete[1]]
    fitted, likely = _fit(_encode(known_values, known_values), labels, _encode(values, known_values), seed)
    alone = main_metric([replace(p, predicted=answer) for p, answer in zip(answers, fitted, strict=True)])
    alone = _undefined if None in fitted else alone
    model = main_metric(answers)
    design = np.hstack([np.ones((len(values), 1)), _encode(values, values), likely])
    correlation = _partial_correlation(answers, design)
    subjects, rows = np.unique([p.subject_id for p in answers], return_inverse=True)

    def metrics(weights: NDArray) -> dict[str, NDArray]:
        found = {"model": model(weights[:, rows]), "confounds_alone": alone(weights[:, rows])}
        found["difference"] = found["model"] - found["confounds_alone"]
        return found | {"partial": correlation(weights[:, rows])}

    def on_matched(column: Sequence[Value]) -> tuple[int, Estimate]:
        sets = np.array(match(column, [str(p.label) for p in answers], seed), int)
        score = main_metric([answers[i] for i in sets.ravel()])
        of_sets = lambda weights: {"": score(np.repeat(weights, sets.shape[-1], 1))}  # noqa: E731
        return sets.size, estimate(of_sets, len(sets), settings, seed)[""]

    by_name = zip(columns, zip(*values, strict=True), strict=True)
    matched = {name: on_matched(column) for name, column in by_name if isinstance(answers[0].label, str)}
    estimates = estimate(metrics, len(subjects), settings, seed)
    left_out, metric = len(everyone) - len(subjects), main_metric_name(answers)
    fields: dict[str, Any] = {**estimates, "coefficients": design.shape[1], "matched": matched}
    found = ConfoundAnalysis(answers[0].target, metric, tuple(columns), len(subjects), left_out, **fields)
    return found, reasons


def site_drop(
    predictions: Sequence[Prediction], training_sites: set[str], settings: EvaluateSettings, seed: int = 0
) -> SiteDrop | None:
    """Compare subjects of external and of known sites; None without both. Arguments as ``analyse_confounds``."""
    answers = [p for p in subject_answers(predictions) if p.metadata.get("site") is not None]
    subjects, rows = np.unique([p.subject_id for p in answers], return_inverse=True)
    outside = np.array([str(p.metadata["site"]) not in training_sites for p in answers], bool)
    if not training_sites or outside.all() or not outside.any():
        return None
    parts = [np.flatnonzero(outside == external) for external in (False, True)]
    scores = [main_metric([answers[i] for i in part]) for part in parts]

    def metrics(weights: NDArray) -> dict[str, NDArray]:
        known, external = (score(weights[:, rows[part]]) for score, part in zip(scores, parts, strict=True))
        return {"known": known, "external": external, "difference": external - known}

    estimates = estimate(metrics, len(subjects), settings, seed)
    counts = len({*rows[parts[0]]}), len({*rows[parts[1]]})
    return SiteDrop(answers[0].target, main_metric_name(answers), counts, **estimates)


def match(values: Sequence[Value], labels: Sequence[str], seed: int = 0) -> list[list[int]]:
    """Match subjects of different classes by a confound, and return sets of indices, one of each class.

    Each subject of the smallest class, in random order, gets the nearest free subject of each other class. Numbers
    differ by at most ``CALIPER``, categories are equal. Subjects without a partner in every class are left out.
    """
    of_class: dict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        of_class[label].append(i)
    smallest, *others = sorted(of_class.values(), key=len)
    numeric = all(isinstance(value, float) for value in values)
    places = np.array(values) if numeric else np.unique(list(map(str, values)), return_inverse=True)[1]
    limit = CALIPER * places.std() if numeric else 0
    sets = [[i] for i in np.random.default_rng(seed).permutation(smallest).tolist()] if others else []
    for free in map(np.array, others):
        kept = []
        for one in sets:
            distances = np.abs(places[free] - places[one[0]])
            if len(free) and distances.min() <= limit:
                kept.append([*one, int(free[distances.argmin()])])
                free = np.delete(free, distances.argmin())
        sets = kept
    return sets


def _value(prediction: Prediction, name: str, volumes: Mapping[str, float]) -> Value | None:
    value = prediction.metadata.get(name)
    if value is None and name == "brain_volume":
        value = volumes.get(prediction.subject_id)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if isfinite(value) else None
    return None if value is None else str(value).strip() or None


def _why_unused(evaluated: Sequence[Value | None], training: Sequence[Value | None]) -> str:
    """The reason why a confound with these values cannot be used; empty if it can be."""
    both = [[value for value in column if value is not None] for column in (evaluated, training)]
    if 2 * len(both[0]) <= len(evaluated) or 2 * len(both[1]) <= len(training):
        return "at least half of the subjects do not have it"
    if len({*both[1]}) < 2:
        return "it is constant in the training split"
    texts = any(isinstance(value, str) for values in both for value in values)
    return MANY if texts and any(len({*values}) > max(2, len(values) / 5) for values in both) else ""


def _encode(rows: Sequence[tuple[Value, ...]], reference: Sequence[tuple[Value, ...]]) -> NDArray:
    """Columns of a regression: numbers standardised by the reference rows; 0 or 1 for each of their categories."""
    columns = []
    for values, known in zip(zip(*rows, strict=True), zip(*reference, strict=True), strict=True):
        if all(isinstance(value, float) for value in (*values, *known)):
            columns.append((np.array([values]).T - np.mean(known)) / (np.std(known) or 1))
        else:
            columns.append(np.equal(np.array([values], str).T, sorted({*map(str, known)})).astype(float))
    return np.hstack(columns)


def _fit(known: NDArray, labels: Sequence[Any], new: NDArray, seed: int) -> tuple[Sequence[Any], NDArray]:
    """Fit a regression; return its answers to new rows and, for classes, the probabilities of all but the first."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    if not isinstance(labels[0], str):
        return RidgeCV(np.logspace(-3, 3, 13)).fit(known, labels).predict(new).tolist(), new[:, :0]
    counts = Counter(labels)
    if len(counts) < 2 or min(counts.values()) < 2:
        return [None] * len(new), new[:, :0]
    folds = StratifiedKFold(min(FOLDS, *counts.values()), shuffle=True, random_state=seed)
    model = LogisticRegression(class_weight="balanced", solver="newton-cholesky")
    search = GridSearchCV(model, {"C": np.logspace(-2, 2, 5)}, scoring="neg_log_loss", cv=folds).fit(known, labels)
    return search.predict(new).tolist(), search.predict_proba(new)[:, 1:]


def _undefined(weights: NDArray) -> NDArray:
    return np.full(len(weights), np.nan)


def _partial_correlation(rows: Sequence[Prediction], design: NDArray) -> Callable[[NDArray], NDArray]:
    """A function from weights (resamples, n) to partial correlations (resamples,), see ``analyse_confounds``.

    Args:
        design: (n, coefficients), ones and the confounds.
    """
    if len(rows) < 2 * design.shape[1]:
        return _undefined
    both = [np.array([[p.label for p in rows]]).T, np.array([[p.predicted for p in rows]]).T]
    if isinstance(rows[0].label, str):
        classes = sorted({str(p.label) for p in rows})
        likely = [[p.probabilities.get(name, p.predicted == name) for name in classes] for p in rows]
        both = [np.equal(both[0], classes), np.array(likely)]
    both = [values - values.mean(0) for values in (values.astype(float) for values in both)]
    both = [values / (np.sqrt((values**2).mean(0).sum()) or 1) for values in both]
    whole, first = np.hstack([design, *both]), design.shape[1]
    truth, answer = slice(both[0].shape[1]), slice(both[0].shape[1], None)

    def correlation(weights: NDArray) -> NDArray:
        sums = np.array([(of_one[:, None] * whole).T @ whole for of_one in weights])
        inverse = np.linalg.pinv(sums[:, :first, :first], rcond=1e-10, hermitian=True)
        left = sums[:, first:, first:] - sums[:, first:, :first] @ inverse @ sums[:, :first, first:]
        pairs = (truth, truth), (answer, answer), (truth, answer)
        a, b, across = (np.trace(left[:, rows, columns], axis1=1, axis2=2) for rows, columns in pairs)
        return np.clip(ratio(across, np.sqrt(np.where(np.minimum(a, b) > 1e-9 * len(rows), a * b, 0))), -1, 1)

    return correlation
