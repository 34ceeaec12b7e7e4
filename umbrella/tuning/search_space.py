"""The search space of a sweep: ``tune.space``, read and checked before anything starts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice, product
from math import exp, floor, log
from typing import Any

import numpy as np

from umbrella.base import UserError
from umbrella.config import Settings

CATEGORICAL = ("grid", "choice")
RANGES = {
    "uniform": "[low, high] with low < high",
    "loguniform": "[low, high] with 0 < low < high",
    "quniform": "[low, high, step] with low < high and 0 < step <= high - low",
    "randint": "[low, high] with low < high, two whole numbers, both of them included",
}
"""Kinds of parameters, and the syntax of ranges, which include both ends."""
DIGITS = 4
"""Significant digits of a sampled number. With few digits, the name of a run can show the exact value."""
NOT_SWEEPABLE = (
    "experiment",
    "name",
    "checkpoint",
    "output",
    "compare",
    "tune",
    "resources",
    "tracking",
    "cohort",
    "data",
    "evaluate",
    "baseline",
)
SWEEPABLE_DATA = ("data.bucket_batches", "data.pack", "data.pack_prefixes", "data.prefetch")
"""Settings of ``data`` that act in the workers of a trial. The others act once, before the trials start."""
MAX_CHECKED = 50_000
"""Maximum number of combinations of a section that are checked before the start; this takes a few seconds."""
MAX_COMBINATIONS_TRIED = 1000
"""Maximum number of combinations with other swept values that are tried for a value that is refused alone."""


@dataclass(frozen=True)
class Parameter:
    """A swept name: a setting, or a section whose values are mappings."""

    name: str
    kind: str
    values: Sequence[Any]
    """The values in the type of the setting. For a range: low, high and, for quniform, the step."""
    when: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Conditions: other swept names and their allowed values. All of them must hold, or the parameter is not swept."""

    @property
    def categorical(self) -> bool:
        """Whether the values are a list and not a range."""
        return self.kind in CATEGORICAL

    @property
    def integer(self) -> bool:
        """Whether a range holds whole numbers only."""
        return self.kind == "randint" or all(isinstance(value, int) for value in self.values)

    @property
    def steps(self) -> int:
        """Number of steps between the smallest and the largest value of a quniform range."""
        low, high, step = self.values
        return floor((high - low) / step + 1e-9)

    @property
    def description(self) -> str:
        """Kind, values and conditions: "loguniform [1e-5, 1e-3] where train is all"."""
        values = f"{self.kind} [{', '.join(map(format_value, self.values))}]"
        conditions = [f"{name} is {' or '.join(map(format_value, allowed))}" for name, allowed in self.when.items()]
        return f"{values} where {' and '.join(conditions)}" if conditions else values

    def is_active(self, point: Mapping[str, Any]) -> bool:
        """Whether the values of ``point`` meet all conditions."""
        return all(name in point and point[name] in allowed for name, allowed in self.when.items())

    def sample(self, rng: np.random.Generator) -> Any:
        """Sample a value."""
        if self.categorical:
            return self.values[int(rng.integers(len(self.values)))]
        low, high = self.values[:2]
        if self.kind == "quniform":
            return self.rounded(low + self.values[2] * rng.integers(self.steps + 1))
        if self.kind == "loguniform":  # an integer n has the probability of the interval [n, n + 1)
            value = exp(rng.uniform(log(low), log(high + self.integer)))
            return self.rounded(floor(value) if self.integer else value)
        return self.rounded(rng.integers(low, high, endpoint=True) if self.integer else rng.uniform(low, high))

    def rounded(self, value: float) -> Any:
        """The value of a range that is nearest to ``value``: on a step, within the ends, in the setting's type."""
        low, high = self.values[:2]
        if self.kind == "quniform":
            step = self.values[2]
            count = min(max(round((value - low) / step), 0), self.steps)
            return type(low)(f"{low + count * step:.10g}")
        value = round(value) if self.integer else float(f"{value:.{DIGITS}g}")
        return type(low)(min(max(value, low), high))


def read_space(settings: Settings, fixed: frozenset[str] = frozenset()) -> list[Parameter]:
    """Read and check ``tune.space``.

    Args:
        fixed: names set on the command line; they are not swept.

    Returns:
        The parameters without the fixed ones and without those whose conditions are never met. Each comes after the
        parameters that its conditions name; grids come as early as this allows.

    Raises:
        UserError: a name is unknown or cannot be swept; a value, a range, a condition or a combination is not valid.
    """
    names = [name for name in settings.tune.space if not is_fixed(name, fixed)]
    for name, other in product(names, names):
        if name != other and contains(name, other):
            raise UserError(f"tune.space.{other}: is part of {name}, which is swept too; leave one of them out")
    if settings.tune.seeds > 1 and "seed" in names:
        raise UserError("tune.space.seed: tune.seeds sets the seed of every run; leave one of them out")
    parameters = _sort_by_conditions([_parse(name, names, settings) for name in names])
    parameters = list(_resolve_conditions(parameters, settings, fixed))
    for section in dict.fromkeys(section_of(parameter.name) for parameter in parameters):
        variants(settings, parameters, section)
    return parameters


def combinations(
    parameters: Sequence[Parameter],
    values: Callable[[Parameter], Sequence[Any]],
    point: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Iterate over all combinations of values. A point omits parameters that are inactive or have no values.

    Args:
        parameters: each after the parameters that its conditions name.
        values: returns the values of a parameter. It is called again for every combination of earlier values.
        point: the earlier values.
    """
    point = dict(point or {})
    if not parameters:
        yield point
        return
    first, *rest = parameters
    own = values(first) if first.is_active(point) else []
    for value in own:
        yield from combinations(rest, values, {**point, first.name: value})
    if not own:
        yield from combinations(rest, values, point)


def variants(settings: Settings, parameters: Sequence[Parameter], *sections: str) -> list[Settings]:
    """The settings of all trials, where trials that are equal in these sections count once.

    Parameters with a range keep the value of ``settings``.

    Raises:
        UserError: a combination is not valid.
    """
    needed = {parameter.name for parameter in parameters if section_of(parameter.name) in sections}
    for parameter in reversed(parameters):  # add what conditions depend on, directly or not
        if parameter.name in needed:
            needed |= parameter.when.keys()
    needed_parameters = [parameter for parameter in parameters if parameter.name in needed]
    points = islice(combinations(needed_parameters, lambda p: p.values if p.categorical else ()), MAX_CHECKED)
    own = ({name: value for name, value in point.items() if section_of(name) in sections} for point in points)
    return [settings_at(settings, point) for point in unique_points(own)]


def settings_at(settings: Settings, point: Mapping[str, Any]) -> Settings:
    """The settings with the values of a point.

    Raises:
        UserError: the values are not valid together.
    """
    try:
        return settings.with_values(point)
    except UserError as error:
        where, why = f"tune.space.{next(iter(point))}", "; ".join(str(error).splitlines())
        remedy = "leave such values out, or sweep the names together, as values of their section"
        raise UserError(f"{where}: {format_point(point)} are not valid together: {why}; {remedy}") from None


def unique_points(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points without duplicates, in order."""
    kept: dict[str, dict[str, Any]] = {}
    for point in points:
        kept.setdefault(repr(sorted(point.items(), key=lambda item: item[0])), point)
    return list(kept.values())


def is_fixed(name: str, fixed: Iterable[str]) -> bool:
    """Whether a swept name, a part of it or its section is among the fixed names."""
    return any(contains(name, other) or contains(other, name) for other in fixed)


def contains(name: str, other: str) -> bool:
    """Whether ``other`` is the same name, or a setting in the section ``name``."""
    return other == name or other.startswith(f"{name}.")


def section_of(name: str) -> str:
    """The top-level section of a setting: "optim" for "optim.lr"."""
    return name.split(".")[0]


def format_point(point: Mapping[str, Any]) -> str:
    """Format a point for people: ``lr=3e-4 supervise=all``. Names are shortened as far as they stay unique."""
    return " ".join(f"{short_name(name, point)}={format_value(value)}" for name, value in point.items()) or "as set"


def format_value(value: Any) -> str:
    """Format a value for people: 3e-4, 96x96x96, (grid=32x32x32 patch=8x8x8)."""
    if isinstance(value, float):
        plain = f"{value:.15g}"  # 1, where repr has 1.0
        if value == 0 or 1e-3 <= abs(value) < 1e6:
            return plain
        mantissa, _, exponent = f"{value:.14e}".partition("e")
        return f"{float(mantissa):.15g}e{int(exponent)}"
    if isinstance(value, Mapping):
        return f"({' '.join(f'{key}={format_value(part)}' for key, part in value.items())})"
    if isinstance(value, list | tuple):
        numbers = all(isinstance(part, int) for part in value)
        return "x".join(map(str, value)) if numbers else f"[{', '.join(map(format_value, value))}]"
    return {None: "null", "": '""'}.get(value, str(value))


def short_name(name: str, point: Iterable[str]) -> str:
    """The last parts of a name, as few as are unique among ``point`` and the settings that can be swept."""
    others = {f".{other}" for other in (*_sweepable_names(), *point) if other != name}
    parts = name.split(".")
    endings = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in endings if not any(other.endswith(f".{end}") for other in others)), name)


@cache
def _sweepable_names() -> list[str]:
    return [name for name in Settings().flat() if section_of(name) not in NOT_SWEEPABLE]


def _sort_by_conditions(parameters: Sequence[Parameter]) -> list[Parameter]:
    pending = sorted(parameters, key=lambda parameter: parameter.kind != "grid")
    ordered: list[Parameter] = []
    while pending:
        names = {parameter.name for parameter in pending}
        ready = next((parameter for parameter in pending if not names & parameter.when.keys()), None)
        if ready is None:
            cycle = ", ".join(sorted(names))
            raise UserError(f"tune.space.{pending[0].name}: conditions of {cycle} form a cycle; remove one of them")
        pending.remove(ready)
        ordered.append(ready)
    return ordered


def _resolve_conditions(
    parameters: Sequence[Parameter], settings: Settings, fixed: frozenset[str]
) -> Iterator[Parameter]:
    """Drop conditions that fixed settings meet, and parameters whose conditions are never met."""
    values, swept = settings.flat(), set[str]()
    for parameter in parameters:
        when = {n: a for n, a in parameter.when.items() if not is_fixed(n, fixed) or values.get(n) not in a}
        if when.keys() <= swept:
            swept.add(parameter.name)
            yield replace(parameter, when=when)


def _parse(name: str, names: Sequence[str], settings: Settings) -> Parameter:
    """Parse and check one line of ``tune.space``.

    Args:
        names: all swept names.
    """
    where, line = f"tune.space.{name}", dict(settings.tune.space[name])
    if section_of(name) in NOT_SWEEPABLE and name not in SWEEPABLE_DATA:
        raise UserError(f"{where}: {section_of(name)} settings are the same for every trial and cannot be swept")
    when = line.pop("when", {})
    sections = {f"{name}.{key}" for key, value in line.items() if isinstance(value, Mapping)}
    if nested := sorted(s for s in sections if any(contains(s, other) for other in settings.flat())):
        raise UserError(f"{where}: names are written with dots; write {', '.join(f'{n}: {{...}}' for n in nested)}")
    kind, raw = next(iter(line.items()), ("", None))
    if len(line) != 1 or kind not in (*CATEGORICAL, *RANGES):
        kinds = ", ".join((*CATEGORICAL, *RANGES))
        raise UserError(f"{where}: {line} must have one of {kinds}, as in {{grid: [1, 2]}}, and only when beside it")
    if section_of(name) == "modalities" and kind not in CATEGORICAL:
        raise UserError(f"{where}: volumes are prepared for each value before the start; list the values, as a grid")
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise UserError(f"{where}: {kind} takes a list of at least one value, not {raw!r}")
    if kind in CATEGORICAL:
        values = [_validate(name, value, names, settings) for value in raw]
    else:
        values = _parse_range(name, kind, raw, names, settings)
    return Parameter(name, kind, values, _parse_conditions(name, when, names, settings))


def _parse_range(name: str, kind: str, raw: Sequence[Any], names: Sequence[str], settings: Settings) -> list[Any]:
    values = [_validate(name, value, names, settings) for value in raw[:2]]
    for step in raw[2:]:
        with suppress(TypeError, ValueError):  # YAML reads 1e-4 as a string
            step = step if isinstance(step, int) else float(step)
        values.append(step)
    valid = len(values) == 2 + (kind == "quniform")
    valid = valid and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    valid = valid and values[0] < values[1] and (kind != "loguniform" or values[0] > 0)
    valid = valid and (kind != "quniform" or 0 < values[2] <= values[1] - values[0])
    whole = kind == "randint" or isinstance(values[0], int)
    if not valid or (whole and any(value != int(value) for value in values)):
        takes = f"{kind} takes {RANGES[kind]}{', all of them whole numbers' if whole else ''}, not {raw}"
        raise UserError(f"tune.space.{name}: {takes}; for a list of values use grid or choice")
    return values


def _validate(name: str, value: Any, names: Sequence[str], settings: Settings, where: str = "", hint: str = "") -> Any:
    """The value in the type of its setting.

    A value that is refused alone is tried again together with the other swept values of its section.

    Args:
        where: start of the error message; the line of ``name`` if empty.
        hint: end of the error message.
    """
    others = [other for other in names if other != name and section_of(other) == section_of(name)]
    space = settings.tune.space
    lists = {other: [v for kind in CATEGORICAL for v in space[other].get(kind) or ()] for other in others}
    lists = {other: values for other, values in lists.items() if values}
    found = (dict(zip(lists, values, strict=True)) for values in product(*lists.values()))
    try:
        return _value_in(settings.with_values({name: value}).flat(), name, value)
    except UserError as error:
        for more in islice(found, MAX_COMBINATIONS_TRIED):
            with suppress(UserError):
                return _value_in(settings.with_values({name: value, **more}).flat(), name, value)
        why = "; ".join(str(error).splitlines())
        raise UserError(f"{where or f'tune.space.{name}'}: {why}{hint}") from None


def _value_in(flat: Mapping[str, Any], name: str, value: Any) -> Any:
    """The value of a name in flat settings; of a section, the part that ``value`` names."""
    if name not in flat and isinstance(value, Mapping):
        return {key: _value_in(flat, f"{name}.{key}", part) for key, part in value.items()}
    return flat.get(name, value)


def _parse_conditions(name: str, when: Any, names: Sequence[str], settings: Settings) -> dict[str, list[Any]]:
    where = f"tune.space.{name}: when"
    if not isinstance(when, Mapping):
        raise UserError(f"{where} takes names and values, as in {{model.train: [embedder, all]}}, not {when!r}")
    conditions = {}
    for other, raw in when.items():
        line = settings.tune.space.get(other) or {}
        kind = next((kind for kind in CATEGORICAL if kind in line), None)
        if kind is None or other == name:
            raise UserError(f"{where}: {other} is not swept by a grid or a choice; add one, or remove the condition")
        possible = [_validate(other, value, names, settings) for value in line[kind]]
        values = raw if isinstance(raw, list) else [raw]
        hint = f"; write its values as a list, {other}: [{', '.join(map(str, possible))}]"
        allowed = [_validate(other, value, names, settings, where, hint) for value in values]
        for value in allowed:
            if value not in possible:
                listed = ", ".join(map(format_value, possible))
                raise UserError(f"{where}: {other} is never {format_value(value)}; its values are {listed}")
        if not allowed:
            raise UserError(f"{where}: {other} needs at least one value")
        conditions[other] = allowed
    return conditions
