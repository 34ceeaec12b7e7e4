"""One line of ``tune.space``: which values a setting takes, how one is drawn, and when the setting is swept at all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, floor, log
from typing import Any

import numpy as np

CATEGORICAL = {"grid": "[value, ...]", "choice": "[value, ...]"}
RANGES = {
    "uniform": "[low, high]",
    "loguniform": "[low, high]",
    "quniform": "[low, high, step]",
    "randint": "[low, high], two whole numbers, both of them included",
}
KINDS = CATEGORICAL | RANGES
"""Kind to what it takes. The ends of a range are part of it."""
DIGITS = 4
"""Significant digits of a drawn number: a run's name then says the number itself, and tells it from every other."""


@dataclass(frozen=True)
class Parameter:
    """What is swept under one name: a setting, or a section whose values are written as mappings."""

    name: str
    kind: str
    values: Sequence[Any]
    """The values as the setting has them; of a range its low and high end, and for quniform the step."""
    when: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Other swept names to values of theirs: swept only where each of them has one of these."""

    @property
    def categorical(self) -> bool:
        """Whether its values are a list, not a range."""
        return self.kind in CATEGORICAL

    @property
    def integer(self) -> bool:
        """Whether a range is one of whole numbers: of such a setting, or by its kind."""
        return self.kind == "randint" or all(isinstance(value, int) for value in self.values)

    @property
    def description(self) -> str:
        """Its values as the YAML file has them: "loguniform [1e-5, 1e-3]"."""
        values = f"{self.kind} [{', '.join(format_value(value) for value in self.values)}]"
        conditions = [
            f"{name} is {' or '.join(format_value(value) for value in allowed)}" for name, allowed in self.when.items()
        ]
        return " where ".join([values, " and ".join(conditions)] if conditions else [values])

    def is_active(self, point: Mapping[str, Any]) -> bool:
        """Whether it is swept where the names before it have these values."""
        return all(name in point and point[name] in allowed for name, allowed in self.when.items())

    def sample(self, rng: np.random.Generator) -> Any:
        """A random value."""
        if self.categorical:
            return self.values[int(rng.integers(len(self.values)))]
        low, high = self.values[:2]
        if self.kind == "quniform":
            return self.rounded(low + self.values[2] * rng.integers(self.steps + 1))
        if self.kind == "loguniform":  # of whole numbers each has the share of the range up to the next
            drawn = exp(rng.uniform(log(low), log(high + self.integer)))
            return self.rounded(floor(drawn) if self.integer else drawn)
        return self.rounded(rng.integers(low, high, endpoint=True) if self.integer else rng.uniform(low, high))

    @property
    def steps(self) -> int:
        """Steps from the low end of a quniform to the highest value that it has."""
        low, high, step = self.values
        return floor((high - low) / step + 1e-9)

    def rounded(self, value: float) -> Any:
        """The nearest value of a range to a number: of the setting's type, on its step, within the ends."""
        low, high = self.values[:2]
        if self.kind == "quniform":
            step = self.values[2]
            count = min(max(round((value - low) / step), 0), self.steps)
            return type(low)(f"{low + count * step:.10g}")
        value = round(value) if self.integer else float(f"{value:.{DIGITS}g}")
        return type(low)(min(max(value, low), high))


def combinations(
    parameters: Sequence[Parameter], values: Callable[[Parameter], Sequence[Any]]
) -> Iterator[dict[str, Any]]:
    """Every combination of values; an entry that is not active, or for which there are none, is left out of it.

    Args:
        entries: each behind those that it depends on.
        values: asked anew wherever the entry is active.
    """

    def grow(rest: Sequence[Parameter], point: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not rest:
            yield point
            return
        first, others = rest[0], rest[1:]
        taken = values(first) if first.is_active(point) else []
        for value in taken:
            yield from grow(others, {**point, first.name: value})
        if not taken:
            yield from grow(others, point)

    yield from grow(parameters, {})


def format_value(value: Any) -> str:
    """A value, short: 3e-4, 96x96x96, (grid=32x32x32 patch=8x8x8)."""
    if isinstance(value, float):
        plain = f"{value:.15g}"  # what people write, where repr would add a ".0"
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
