"""The search space of a sweep: ``tune.space``, read and checked before anything starts."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice, product
from typing import Any

from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.tuning.parameter import CATEGORICAL, KINDS, Parameter, combinations, format_value

MAX_CHECKED = 50_000
"""Combinations of a section that are checked at most, in a few seconds; each point is, before it runs."""


def read_space(settings: Settings, given: frozenset[str] = frozenset()) -> list[Parameter]:
    """``tune.space``, checked, less what is set on the command line and what is then never swept.

    Args:
        given: names set on the command line.

    Returns:
        Each entry behind those that it depends on, and grids as early as that allows.

    Raises:
        UserError: a name that is not a setting or cannot be swept, a value that the setting refuses, an unknown kind,
            an empty range, conditions that cannot be met or go in a circle, combinations that the settings refuse.
    """
    names = [name for name in settings.tune.space if not is_fixed(name, given)]
    for name, other in product(names, names):
        if name != other and contains(name, other):
            raise UserError(f"tune.space.{other}: is part of {name}, which is swept too; leave one of them out")
    if settings.tune.seeds > 1 and "seed" in names:
        raise UserError("tune.space.seed: tune.seeds sets the seed of every run; leave one of them out")
    parameters = _in_order([parse_parameter(name, names, settings) for name in names])
    parameters = list(_possible(parameters, settings, given))
    for section in dict.fromkeys(section_of(parameter.name) for parameter in parameters):
        variants(settings, parameters, section)
    return parameters


def variants(settings: Settings, parameters: Sequence[Parameter], *sections: str) -> list[Settings]:
    """The settings with every combination that trials can have of the listed values of these sections.

    What is drawn from a range keeps the settings' value.

    Raises:
        UserError: combinations that the settings refuse.
    """
    needed = {parameter.name for parameter in parameters if section_of(parameter.name) in sections}
    for parameter in reversed(parameters):  # and what they depend on, at any remove
        if parameter.name in needed:
            needed |= parameter.when.keys()
    chain = [parameter for parameter in parameters if parameter.name in needed]
    points = islice(
        combinations(chain, lambda parameter: parameter.values if parameter.categorical else ()), MAX_CHECKED
    )
    own = ({name: value for name, value in point.items() if section_of(name) in sections} for point in points)
    return [settings_at(settings, point) for point in unique_points(own)]


def settings_at(settings: Settings, point: Mapping[str, Any]) -> Settings:
    """The settings at a point. Raises UserError where the values do not go together."""
    try:
        return settings.with_values(point)
    except UserError as error:
        where, why = f"tune.space.{next(iter(point))}", "; ".join(str(error).splitlines())
        remedy = "leave such values out, or sweep the names together, as values of their section"
        raise UserError(f"{where}: {format_point(point)} do not go together: {why}; {remedy}") from None


def unique_points(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points without repetitions, in order."""
    kept: dict[str, dict[str, Any]] = {}
    for point in points:
        kept.setdefault(repr(sorted(point.items(), key=lambda item: item[0])), point)
    return list(kept.values())


def in_space_order(point: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The point with its names in the order of ``tune.space``."""
    return {name: point[name] for name in settings.tune.space if name in point}


def with_seeds(point: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """The point once for each of ``tune.seeds``; with one seed, it keeps the settings' and does not name it."""
    seeds = settings.tune.seeds
    return [{**point, "seed": settings.seed + k} if seeds > 1 else point for k in range(seeds)]


def is_fixed(name: str, given: frozenset[str]) -> bool:
    """Whether a swept name, or part of it, is set on the command line: then it is not swept."""
    return any(contains(name, other) or contains(other, name) for other in given)


def format_point(point: Mapping[str, Any]) -> str:
    """A trial in words: ``lr=3e-4 supervise=all``. A name is cut to the end that no other setting's has."""
    return " ".join(f"{_short(name, point)}={format_value(value)}" for name, value in point.items()) or "as set"


def _short(name: str, beside: Iterable[str]) -> str:
    others = {f".{other}" for other in (*_sweepable_names(), *beside) if other != name}
    parts = name.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), name)


@cache
def _sweepable_names() -> list[str]:
    return [name for name in Settings().flat() if section_of(name) not in NOT_SWEEPABLE]


def _in_order(parameters: Sequence[Parameter]) -> list[Parameter]:
    pending = sorted(parameters, key=lambda parameter: parameter.kind != "grid")
    ordered: list[Parameter] = []
    while pending:
        open_names = {parameter.name for parameter in pending}
        ready = next((parameter for parameter in pending if not open_names & parameter.when.keys()), None)
        if ready is None:
            names = ", ".join(sorted(open_names))
            raise UserError(f"tune.space.{pending[0].name}: conditions of {names} go in a circle; take one out")
        pending.remove(ready)
        ordered.append(ready)
    return ordered


def _possible(parameters: Sequence[Parameter], settings: Settings, given: frozenset[str]) -> Iterator[Parameter]:
    """The entries, less conditions that fixed settings meet, and less entries that fixed settings rule out."""
    fixed, swept = settings.flat(), set()
    for parameter in parameters:
        conditions = {}
        for name, allowed in parameter.when.items():
            if not is_fixed(name, given):
                conditions[name] = allowed
                if name not in swept:
                    break
            elif fixed.get(name) not in allowed:
                break
        else:
            swept.add(parameter.name)
            yield Parameter(parameter.name, parameter.kind, parameter.values, conditions)


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
"""What of ``data`` acts in each trial's own workers; the rest was done once, for all of them."""
MAX_COMBINATIONS_TRIED = 1000
"""Combinations with others of its section in which a value is tried that is refused alone."""


def parse_parameter(name: str, names: Sequence[str], settings: Settings) -> Parameter:
    """The entry of a name in ``tune.space``.

    Args:
        names: all that are swept.

    Raises:
        UserError: a name that is not a setting or cannot be swept, a value that the setting refuses, an unknown kind,
            an empty range, a condition on what is not swept or never has such a value.
    """
    where, parameter = f"tune.space.{name}", dict(settings.tune.space[name])
    if section_of(name) in NOT_SWEEPABLE and name not in SWEEPABLE_DATA:
        raise UserError(f"{where}: {section_of(name)} settings are the same for every trial and cannot be swept")
    when = parameter.pop("when", {})
    if nested := list(_nested(name, parameter, settings.flat())):
        raise UserError(f"{where}: names are written with dots; write {', '.join(f'{n}: {{...}}' for n in nested)}")
    kinds = [kind for kind in parameter if kind in KINDS]
    if len(kinds) > 1:
        raise UserError(f"{where}: {' and '.join(kinds)} are kinds, and it has one; leave the others out")
    if not kinds:
        raise UserError(f"{where}: {parameter} is none of {', '.join(KINDS)}, as in {{grid: [1, 2]}}")
    if len(parameter) > 1:
        others = ", ".join(str(key) for key in parameter if key not in kinds)
        raise UserError(f"{where}: {others}: beside {kinds[0]} there can only be when; leave it out")
    ((kind, raw),) = parameter.items()
    if section_of(name) == "modalities" and kind not in CATEGORICAL:
        raise UserError(f"{where}: volumes are prepared for each value before the start; list the values, as a grid")
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise UserError(f"{where}: {kind} takes a list of at least one value, not {raw!r}")
    if kind in CATEGORICAL:
        values = [_validated(name, value, names, settings) for value in raw]
    else:
        values = _range(name, kind, raw, names, settings)
    return Parameter(name, kind, values, _conditions(name, when, names, settings))


def _nested(name: str, parameter: Mapping[str, Any], known: Collection[str]) -> Iterator[str]:
    """The dotted names of settings that are written as sections in sections."""
    for key, value in parameter.items():
        inner = f"{name}.{key}"
        if isinstance(value, Mapping) and any(contains(inner, other) for other in known):
            yield from list(_nested(inner, value, known)) or [inner]


def _range(name: str, kind: str, raw: Sequence[Any], names: Sequence[str], settings: Settings) -> list[Any]:
    where = f"tune.space.{name}: {kind} takes {KINDS[kind]}"
    if len(raw) != 2 + (kind == "quniform"):
        raise UserError(f"{where}; a list of values is a grid or a choice")
    values = [_validated(name, value, names, settings) for value in raw[:2]]
    if kind == "quniform":
        values.append(_number(raw[2]))
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise UserError(f"{where}: numbers; a list of values is a grid or a choice")
    low, high = values[:2]
    if not low < high or (kind == "loguniform" and low <= 0):
        raise UserError(f"{where}, with low < high{' and low > 0' * (kind == 'loguniform')}")
    if kind == "quniform" and not 0 < values[2] <= high - low:
        raise UserError(f"{where}, with a step above 0 that is not longer than the range")
    whole = kind == "randint" or isinstance(low, int)
    if whole and any(value != int(value) for value in values):
        raise UserError(f"{where}, and these are no whole numbers: {', '.join(map(format_value, values))}")
    return values


def _number(raw: Any) -> Any:
    try:
        return raw if isinstance(raw, int) else float(raw)
    except (TypeError, ValueError):  # YAML reads 1e-4 as a text, and anything else is no number
        return raw


def _validated(name: str, value: Any, names: Sequence[str], settings: Settings, where: str = "", how: str = "") -> Any:
    """The value as the setting has it: YAML reads 1e-4 as a text.

    A value that is refused alone may go with one of another swept name of its section.

    Args:
        where: it stands, if that is not the entry of the name; how: it is written there.
    """
    try:
        return _resolved(settings.with_values({name: value}).flat(), name, value)
    except UserError as error:
        for others in _combinations_in_section(name, names, settings):
            with suppress(UserError):
                return _resolved(settings.with_values({name: value, **others}).flat(), name, value)
        why = "; ".join(str(error).splitlines())
        raise UserError(f"{where or f'tune.space.{name}'}: {why}{how}") from None


def _combinations_in_section(name: str, names: Sequence[str], settings: Settings) -> Iterator[dict[str, Any]]:
    beside = [n for n in names if n != name and section_of(n) == section_of(name)]
    lists = {n: [v for k in CATEGORICAL for v in settings.tune.space[n].get(k) or ()] for n in beside}
    listed = {n: values for n, values in lists.items() if values}
    return islice(
        (dict(zip(listed, values, strict=True)) for values in product(*listed.values())), MAX_COMBINATIONS_TRIED
    )


def _resolved(flat: Mapping[str, Any], name: str, value: Any) -> Any:
    """What settings have where a value was put; of a section only the part that the value names."""
    if name not in flat and isinstance(value, Mapping):
        return {key: _resolved(flat, f"{name}.{key}", part) for key, part in value.items()}
    return flat.get(name, value)


def _conditions(name: str, when: Any, names: Sequence[str], settings: Settings) -> dict[str, list[Any]]:
    where = f"tune.space.{name}: when"
    if not isinstance(when, Mapping):
        raise UserError(f"{where} takes names and values, as in {{model.train: [embedder, all]}}, not {when!r}")
    conditions = {}
    for other, raw in when.items():
        parameter = settings.tune.space.get(other)
        kinds = [kind for kind in CATEGORICAL if kind in (parameter or {})]
        if not kinds or other == name:
            raise UserError(f"{where}: {other} is not swept by a grid or a choice; sweep it so, or leave the condition")
        has = [_validated(other, value, names, settings) for value in (parameter or {})[kinds[0]]]
        values = raw if isinstance(raw, list) and not _is_one_list(raw, has) else [raw]
        how = f"; write its values as a list, {other}: [{', '.join(map(str, has))}]"
        wanted = [_validated(other, value, names, settings, where, how) for value in values]
        for value in wanted:
            if value not in has:
                listed = ", ".join(format_value(v) for v in has)
                raise UserError(f"{where}: {other} is never {format_value(value)}; tune.space has it {listed}")
        if not wanted:
            raise UserError(f"{where}: {other} needs at least one value")
        conditions[other] = wanted
    return conditions


def _is_one_list(raw: Sequence[Any], has: Sequence[Any]) -> bool:
    """Whether a list is one value of a setting whose values are lists, and not several of them."""
    return bool(raw) and all(isinstance(value, list) for value in has) and not any(isinstance(v, list) for v in raw)


def contains(name: str, other: str) -> bool:
    """Whether ``other`` is that name, or lies within the section of that name."""
    return other == name or other.startswith(f"{name}.")


def section_of(name: str) -> str:
    """The room of a setting: "optim" of "optim.lr"."""
    return name.split(".")[0]
