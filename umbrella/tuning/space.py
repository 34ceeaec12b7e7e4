"""A search space in the settings' own names: checked, then handed to Ray Tune."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from ray import tune

from umbrella.base import UserError
from umbrella.config import Settings

KINDS = ("grid", "choice", "uniform", "loguniform")


def build_space(settings: Settings, given: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Ray Tune's search space for ``tune.space``: dotted setting names to distributions, less the names in ``given``.

    Raises:
        UserError: a name that is not a setting, a value that the setting refuses, an unknown kind, an empty range.
    """
    return {name: _domain(name, entry, settings) for name, entry in _swept(settings, given)}


def possible_values(settings: Settings, name: str, given: frozenset[str] = frozenset()) -> list[Any]:
    """Every value that a setting can take in the sweep, where it is swept by a list; else its one value."""
    for swept, entry in _swept(settings, given):
        if swept == name:
            kind, values = _accepted(name, entry, settings)
            return values if kind in ("grid", "choice") else [settings.flat()[name]]
    return [settings.flat()[name]]


def count_trials(settings: Settings, given: frozenset[str] = frozenset()) -> int:
    """How many trials the sweep has."""
    count = settings.tune.samples
    for _, entry in _swept(settings, given):
        count *= len(entry.get("grid", [0]))
    return count


def grid_points(settings: Settings, given: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """The points of the grid part of the space; names that are drawn are shown as what they are drawn from."""
    entries = list(_swept(settings, given))
    axes = [_accepted(name, entry, settings)[1] if "grid" in entry else [str(entry)] for name, entry in entries]
    return [dict(zip([name for name, _ in entries], point, strict=True)) for point in product(*axes)]


def label(point: Mapping[str, Any]) -> str:
    """A trial in words: ``lr=0.001 supervise=all``."""
    return " ".join(f"{name.rsplit('.', 1)[-1]}={_short(value)}" for name, value in point.items()) or "as set"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _swept(settings: Settings, given: frozenset[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((name, entry) for name, entry in settings.tune.space.items() if name not in given)


def _domain(name: str, entry: Mapping[str, Any], settings: Settings) -> Any:
    kind, values = _accepted(name, entry, settings)
    if kind == "grid":
        return tune.grid_search(values)
    if kind == "choice":
        return tune.choice(values)
    if len(values) != 2 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise UserError(f"tune.space.{name}: {kind} takes [low, high], two numbers; a list of values is a grid")
    low, high = values
    if not low < high or (kind == "loguniform" and low <= 0):
        needs = "low < high" + " and low > 0" * (kind == "loguniform")
        raise UserError(f"tune.space.{name}: {kind} takes [low, high] with {needs}")
    if isinstance(low, int):  # a setting of whole numbers; Ray's upper end is exclusive
        return tune.randint(low, high + 1) if kind == "uniform" else tune.lograndint(low, high + 1)
    return tune.uniform(low, high) if kind == "uniform" else tune.loguniform(low, high)


def _accepted(name: str, entry: Mapping[str, Any], settings: Settings) -> tuple[str, list[Any]]:
    """The kind of an entry, and its values as the setting takes them: YAML reads 1e-4 as a text."""
    where = f"tune.space.{name}"
    if name.split(".")[0] in ("experiment", "name", "tune", "resources", "tracking", "cohort", "data"):
        raise UserError(f"{where}: {name.split('.')[0]} settings are the same for every trial and cannot be swept")
    if len(entry) != 1 or next(iter(entry)) not in KINDS:
        raise UserError(f"{where}: {dict(entry)} is none of {', '.join(KINDS)}, as in {{grid: [1, 2]}}")
    kind, values = next(iter(entry.items()))
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise UserError(f"{where}: {kind} takes a list of at least one value, not {values!r}")
    try:
        return kind, [settings.with_values({name: value}).flat().get(name, value) for value in values]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
