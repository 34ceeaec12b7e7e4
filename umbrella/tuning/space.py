"""A search space in the settings' own names, read and checked before anything starts. No Ray here."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice, product
from typing import Any

from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.tuning.entry import Entry, combine, in_words
from umbrella.tuning.reading import FIXED, covers, read_entry, section_of

CHECKED = 50_000
"""Combinations of a section that are checked at most, in a few seconds; each point is, before it runs."""


def read_space(settings: Settings, given: frozenset[str] = frozenset()) -> list[Entry]:
    """``tune.space``, checked, less what is set on the command line and what is then never swept.

    Args:
        given: names set on the command line.

    Returns:
        Each entry behind those that it depends on, and grids as early as that allows.

    Raises:
        UserError: a name that is not a setting or cannot be swept, a value that the setting refuses, an unknown kind,
            an empty range, conditions that cannot be met or go in a circle, combinations that the settings refuse.
    """
    names = [name for name in settings.tune.space if not is_given(name, given)]
    for name, other in product(names, names):
        if name != other and covers(name, other):
            raise UserError(f"tune.space.{other}: is part of {name}, which is swept too; leave one of them out")
    if settings.tune.seeds > 1 and "seed" in names:
        raise UserError("tune.space.seed: tune.seeds sets the seed of every run; leave one of them out")
    entries = _in_order([read_entry(name, names, settings) for name in names])
    entries = list(_possible(entries, settings, given))
    for section in dict.fromkeys(section_of(entry.name) for entry in entries):
        variants(settings, entries, section)
    return entries


def variants(settings: Settings, entries: Sequence[Entry], *sections: str) -> list[Settings]:
    """The settings with every combination that trials can have of the listed values of these sections.

    What is drawn from a range keeps the settings' value.

    Raises:
        UserError: combinations that the settings refuse.
    """
    needed = {entry.name for entry in entries if section_of(entry.name) in sections}
    for entry in reversed(entries):  # and what they depend on, at any remove
        if entry.name in needed:
            needed |= entry.when.keys()
    chain = [entry for entry in entries if entry.name in needed]
    points = islice(combine(chain, lambda entry: entry.values if entry.listed else ()), CHECKED)
    own = ({name: value for name, value in point.items() if section_of(name) in sections} for point in points)
    return [checked(settings, point) for point in distinct(own)]


def checked(settings: Settings, point: Mapping[str, Any]) -> Settings:
    """The settings at a point. Raises UserError where the values do not go together."""
    try:
        return settings.with_values(point)
    except UserError as error:
        where, why = f"tune.space.{next(iter(point))}", "; ".join(str(error).splitlines())
        remedy = "leave such values out, or sweep the names together, as values of their section"
        raise UserError(f"{where}: {label(point)} do not go together: {why}; {remedy}") from None


def distinct(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points without repetitions, in order."""
    kept: dict[str, dict[str, Any]] = {}
    for point in points:
        kept.setdefault(repr(sorted(point.items(), key=lambda item: item[0])), point)
    return list(kept.values())


def as_written(point: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The point with its names in the order of ``tune.space``."""
    return {name: point[name] for name in settings.tune.space if name in point}


def with_seeds(point: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """The point once for each of ``tune.seeds``; with one seed, it keeps the settings' and does not name it."""
    seeds = settings.tune.seeds
    return [{**point, "seed": settings.seed + k} if seeds > 1 else point for k in range(seeds)]


def is_given(name: str, given: frozenset[str]) -> bool:
    """Whether a swept name, or part of it, is set on the command line: then it is not swept."""
    return any(covers(name, other) or covers(other, name) for other in given)


def label(point: Mapping[str, Any]) -> str:
    """A trial in words: ``lr=3e-4 supervise=all``. A name is cut to the end that no other setting's has."""
    return " ".join(f"{_short(name, point)}={in_words(value)}" for name, value in point.items()) or "as set"


def _short(name: str, beside: Iterable[str]) -> str:
    others = {f".{other}" for other in (*_sweepable(), *beside) if other != name}
    parts = name.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), name)


@cache
def _sweepable() -> list[str]:
    return [name for name in Settings().flat() if section_of(name) not in FIXED]


def _in_order(entries: Sequence[Entry]) -> list[Entry]:
    waiting = sorted(entries, key=lambda entry: entry.kind != "grid")
    ordered: list[Entry] = []
    while waiting:
        open_names = {entry.name for entry in waiting}
        ready = next((entry for entry in waiting if not open_names & entry.when.keys()), None)
        if ready is None:
            names = ", ".join(sorted(open_names))
            raise UserError(f"tune.space.{waiting[0].name}: conditions of {names} go in a circle; take one out")
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


def _possible(entries: Sequence[Entry], settings: Settings, given: frozenset[str]) -> Iterator[Entry]:
    """The entries, less conditions that fixed settings meet, and less entries that fixed settings rule out."""
    fixed, swept = settings.flat(), set()
    for entry in entries:
        conditions = {}
        for name, allowed in entry.when.items():
            if not is_given(name, given):
                conditions[name] = allowed
                if name not in swept:
                    break
            elif fixed.get(name) not in allowed:
                break
        else:
            swept.add(entry.name)
            yield Entry(entry.name, entry.kind, entry.values, conditions)
