"""One line of ``tune.space`` from its YAML: its values as the setting has them, its range and conditions checked."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice, product
from typing import Any

from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.tuning.entry import KINDS, LISTED, Entry, in_words

FIXED = (
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
IN_THE_WORKER = ("data.bucket_batches", "data.pack", "data.prefetch")
"""What of ``data`` acts in each trial's own workers; the rest was done once, for all of them."""
COMPANY = 1000
"""Combinations with others of its section in which a value is tried that is refused alone."""


def read_entry(name: str, names: Sequence[str], settings: Settings) -> Entry:
    """The entry of a name in ``tune.space``.

    Args:
        names: all that are swept.

    Raises:
        UserError: a name that is not a setting or cannot be swept, a value that the setting refuses, an unknown kind,
            an empty range, a condition on what is not swept or never has such a value.
    """
    where, entry = f"tune.space.{name}", dict(settings.tune.space[name])
    if section_of(name) in FIXED and name not in IN_THE_WORKER:
        raise UserError(f"{where}: {section_of(name)} settings are the same for every trial and cannot be swept")
    when = entry.pop("when", {})
    if nested := list(_nested(name, entry, settings.flat())):
        raise UserError(f"{where}: names are written with dots; write {', '.join(f'{n}: {{...}}' for n in nested)}")
    kinds = [kind for kind in entry if kind in KINDS]
    if len(kinds) > 1:
        raise UserError(f"{where}: {' and '.join(kinds)} are kinds, and it has one; leave the others out")
    if not kinds:
        raise UserError(f"{where}: {entry} is none of {', '.join(KINDS)}, as in {{grid: [1, 2]}}")
    if len(entry) > 1:
        others = ", ".join(str(key) for key in entry if key not in kinds)
        raise UserError(f"{where}: {others}: beside {kinds[0]} there can only be when; leave it out")
    ((kind, raw),) = entry.items()
    if section_of(name) == "modalities" and kind not in LISTED:
        raise UserError(f"{where}: volumes are prepared for each value before the start; list the values, as a grid")
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise UserError(f"{where}: {kind} takes a list of at least one value, not {raw!r}")
    if kind in LISTED:
        values = [_accepted(name, value, names, settings) for value in raw]
    else:
        values = _range(name, kind, raw, names, settings)
    return Entry(name, kind, values, _conditions(name, when, names, settings))


def _nested(name: str, entry: Mapping[str, Any], known: Collection[str]) -> Iterator[str]:
    """The dotted names of settings that are written as sections in sections."""
    for key, value in entry.items():
        inner = f"{name}.{key}"
        if isinstance(value, Mapping) and any(covers(inner, other) for other in known):
            yield from list(_nested(inner, value, known)) or [inner]


def _range(name: str, kind: str, raw: Sequence[Any], names: Sequence[str], settings: Settings) -> list[Any]:
    where = f"tune.space.{name}: {kind} takes {KINDS[kind]}"
    if len(raw) != 2 + (kind == "quniform"):
        raise UserError(f"{where}; a list of values is a grid or a choice")
    values = [_accepted(name, value, names, settings) for value in raw[:2]]
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
        raise UserError(f"{where}, and these are no whole numbers: {', '.join(map(in_words, values))}")
    return values


def _number(raw: Any) -> Any:
    try:
        return raw if isinstance(raw, int) else float(raw)
    except (TypeError, ValueError):  # YAML reads 1e-4 as a text, and anything else is no number
        return raw


def _accepted(name: str, value: Any, names: Sequence[str], settings: Settings, where: str = "", how: str = "") -> Any:
    """The value as the setting has it: YAML reads 1e-4 as a text.

    A value that is refused alone may go with one of another swept name of its section.

    Args:
        where: it stands, if that is not the entry of the name; how: it is written there.
    """
    try:
        return _taken(settings.with_values({name: value}).flat(), name, value)
    except UserError as error:
        for others in _company(name, names, settings):
            with suppress(UserError):
                return _taken(settings.with_values({name: value, **others}).flat(), name, value)
        why = "; ".join(str(error).splitlines())
        raise UserError(f"{where or f'tune.space.{name}'}: {why}{how}") from None


def _company(name: str, names: Sequence[str], settings: Settings) -> Iterator[dict[str, Any]]:
    beside = [n for n in names if n != name and section_of(n) == section_of(name)]
    lists = {n: [v for k in LISTED for v in settings.tune.space[n].get(k) or ()] for n in beside}
    listed = {n: values for n, values in lists.items() if values}
    return islice((dict(zip(listed, values, strict=True)) for values in product(*listed.values())), COMPANY)


def _taken(flat: Mapping[str, Any], name: str, value: Any) -> Any:
    """What settings have where a value was put; of a section only the part that the value names."""
    if name not in flat and isinstance(value, Mapping):
        return {key: _taken(flat, f"{name}.{key}", part) for key, part in value.items()}
    return flat.get(name, value)


def _conditions(name: str, when: Any, names: Sequence[str], settings: Settings) -> dict[str, list[Any]]:
    where = f"tune.space.{name}: when"
    if not isinstance(when, Mapping):
        raise UserError(f"{where} takes names and values, as in {{model.train: [embedder, all]}}, not {when!r}")
    conditions = {}
    for other, raw in when.items():
        entry = settings.tune.space.get(other)
        kinds = [kind for kind in LISTED if kind in (entry or {})]
        if not kinds or other == name:
            raise UserError(f"{where}: {other} is not swept by a grid or a choice; sweep it so, or leave the condition")
        has = [_accepted(other, value, names, settings) for value in (entry or {})[kinds[0]]]
        values = raw if isinstance(raw, list) and not _is_one_list(raw, has) else [raw]
        how = f"; write its values as a list, {other}: [{', '.join(map(str, has))}]"
        wanted = [_accepted(other, value, names, settings, where, how) for value in values]
        for value in wanted:
            if value not in has:
                listed = ", ".join(in_words(v) for v in has)
                raise UserError(f"{where}: {other} is never {in_words(value)}; tune.space has it {listed}")
        if not wanted:
            raise UserError(f"{where}: {other} needs at least one value")
        conditions[other] = wanted
    return conditions


def _is_one_list(raw: Sequence[Any], has: Sequence[Any]) -> bool:
    """Whether a list is one value of a setting whose values are lists, and not several of them."""
    return bool(raw) and all(isinstance(value, list) for value in has) and not any(isinstance(v, list) for v in raw)


def covers(name: str, other: str) -> bool:
    """Whether ``other`` is that name, or lies within the section of that name."""
    return other == name or other.startswith(f"{name}.")


def section_of(name: str) -> str:
    """The room of a setting: "optim" of "optim.lr"."""
    return name.split(".")[0]
