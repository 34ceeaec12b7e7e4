"""The search space of a sweep: ``tune.space``, read and checked before anything starts."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice, product
from typing import Any

from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.tuning.parameter import CATEGORICAL, KINDS, Parameter, combinations, format_value

NOT_SWEEPABLE = (
    "experiment",
    "name",
    "checkpoint",
    "output",
    "tune",
    "resources",
    "tracking",
    "cohort",
    "data",
    "evaluate",
    "baseline",
)
SWEEPABLE_DATA = ("data.bucket_batches", "data.pack", "data.prefetch")
"""Settings of ``data`` that act in the workers of a trial. The others act once, before the trials start."""
MAX_CHECKED = 50_000
"""Maximum number of combinations of a section that are checked before the start; this takes a few seconds."""
MAX_COMBINATIONS_TRIED = 1000
"""Maximum number of combinations with other swept values that are tried for a value that is refused alone."""


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
    chain = [parameter for parameter in parameters if parameter.name in needed]
    points = islice(combinations(chain, lambda p: p.values if p.categorical else ()), MAX_CHECKED)
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


def in_space_order(point: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The point with its names in the order of ``tune.space``."""
    return {name: point[name] for name in settings.tune.space if name in point}


def with_seeds(point: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """One point for each of ``tune.seeds``. With a single seed, the point itself, without a seed."""
    seeds = settings.tune.seeds
    return [{**point, "seed": settings.seed + k} if seeds > 1 else point for k in range(seeds)]


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
    return " ".join(f"{_short_name(name, point)}={format_value(value)}" for name, value in point.items()) or "as set"


def _short_name(name: str, point: Iterable[str]) -> str:
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
    values, swept = settings.flat(), set()
    for parameter in parameters:
        conditions = {}
        for name, allowed in parameter.when.items():
            if not is_fixed(name, fixed):
                conditions[name] = allowed
                if name not in swept:
                    break
            elif values.get(name) not in allowed:
                break
        else:
            swept.add(parameter.name)
            yield Parameter(parameter.name, parameter.kind, parameter.values, conditions)


def _parse(name: str, names: Sequence[str], settings: Settings) -> Parameter:
    """Parse and check one line of ``tune.space``.

    Args:
        names: all swept names.
    """
    where, line = f"tune.space.{name}", dict(settings.tune.space[name])
    if section_of(name) in NOT_SWEEPABLE and name not in SWEEPABLE_DATA:
        raise UserError(f"{where}: {section_of(name)} settings are the same for every trial and cannot be swept")
    when = line.pop("when", {})
    if nested := list(_nested_names(name, line, settings.flat())):
        raise UserError(f"{where}: names are written with dots; write {', '.join(f'{n}: {{...}}' for n in nested)}")
    kinds = [kind for kind in line if kind in KINDS]
    if len(kinds) > 1:
        raise UserError(f"{where}: has the kinds {' and '.join(kinds)}, but can have only one; leave the others out")
    if not kinds:
        raise UserError(f"{where}: {line} is none of {', '.join(KINDS)}, as in {{grid: [1, 2]}}")
    if len(line) > 1:
        others = ", ".join(str(key) for key in line if key not in kinds)
        raise UserError(f"{where}: {others}: only when is allowed beside {kinds[0]}; leave it out")
    ((kind, raw),) = line.items()
    if section_of(name) == "modalities" and kind not in CATEGORICAL:
        raise UserError(f"{where}: volumes are prepared for each value before the start; list the values, as a grid")
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise UserError(f"{where}: {kind} takes a list of at least one value, not {raw!r}")
    if kind in CATEGORICAL:
        values = [_validate(name, value, names, settings) for value in raw]
    else:
        values = _parse_range(name, kind, raw, names, settings)
    return Parameter(name, kind, values, _parse_conditions(name, when, names, settings))


def _nested_names(name: str, line: Mapping[str, Any], known: Collection[str]) -> Iterator[str]:
    """The dotted names of settings that are written as nested sections."""
    for key, value in line.items():
        inner = f"{name}.{key}"
        if isinstance(value, Mapping) and any(contains(inner, other) for other in known):
            yield from list(_nested_names(inner, value, known)) or [inner]


def _parse_range(name: str, kind: str, raw: Sequence[Any], names: Sequence[str], settings: Settings) -> list[Any]:
    where = f"tune.space.{name}: {kind} takes {KINDS[kind]}"
    if len(raw) != 2 + (kind == "quniform"):
        raise UserError(f"{where}; for a list of values use grid or choice")
    values = [_validate(name, value, names, settings) for value in raw[:2]]
    if kind == "quniform":
        step = raw[2]
        with suppress(TypeError, ValueError):  # YAML reads 1e-4 as a string
            step = raw[2] if isinstance(raw[2], int) else float(raw[2])
        values.append(step)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise UserError(f"{where}: numbers; for a list of values use grid or choice")
    low, high = values[:2]
    if not low < high or (kind == "loguniform" and low <= 0):
        raise UserError(f"{where}, with low < high{' and low > 0' * (kind == 'loguniform')}")
    if kind == "quniform" and not 0 < values[2] <= high - low:
        raise UserError(f"{where}, with 0 < step <= high - low")
    integer = kind == "randint" or isinstance(low, int)
    if integer and any(value != int(value) for value in values):
        raise UserError(f"{where}, and these are not all whole numbers: {', '.join(map(format_value, values))}")
    return values


def _validate(name: str, value: Any, names: Sequence[str], settings: Settings, where: str = "", hint: str = "") -> Any:
    """The value in the type of its setting.

    A value that is refused alone is tried again together with the other swept values of its section.

    Args:
        where: start of the error message; the line of ``name`` if empty.
        hint: end of the error message.
    """
    try:
        return _value_in(settings.with_values({name: value}).flat(), name, value)
    except UserError as error:
        for others in _combinations_in_section(name, names, settings):
            with suppress(UserError):
                return _value_in(settings.with_values({name: value, **others}).flat(), name, value)
        why = "; ".join(str(error).splitlines())
        raise UserError(f"{where or f'tune.space.{name}'}: {why}{hint}") from None


def _combinations_in_section(name: str, names: Sequence[str], settings: Settings) -> Iterator[dict[str, Any]]:
    others = [other for other in names if other != name and section_of(other) == section_of(name)]
    lists = {other: [v for kind in CATEGORICAL for v in settings.tune.space[other].get(kind) or ()] for other in others}
    lists = {other: values for other, values in lists.items() if values}
    found = (dict(zip(lists, values, strict=True)) for values in product(*lists.values()))
    return islice(found, MAX_COMBINATIONS_TRIED)


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
        values = raw if isinstance(raw, list) and not _is_single_value(raw, possible) else [raw]
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


def _is_single_value(raw: Sequence[Any], possible: Sequence[Any]) -> bool:
    """Whether a list is one value of a setting whose values are lists."""
    return (
        bool(raw) and all(isinstance(value, list) for value in possible) and not any(isinstance(v, list) for v in raw)
    )
