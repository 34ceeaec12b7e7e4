"""One parameter of the search space: its values, how they are sampled, and the conditions under which it is swept."""

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
"""Each kind of parameter and its syntax. Ranges include both ends."""
DIGITS = 4
"""Significant digits of a sampled number. With few digits, the name of a run can show the exact value."""


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

    @property
    def steps(self) -> int:
        """Number of steps between the smallest and the largest value of a quniform range."""
        low, high, step = self.values
        return floor((high - low) / step + 1e-9)

    def rounded(self, value: float) -> Any:
        """The value of a range that is nearest to ``value``: on a step, within the ends, in the setting's type."""
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
    """Iterate over all combinations of values. A point omits parameters that are inactive or have no values.

    Args:
        parameters: each after the parameters that its conditions name.
        values: returns the values of a parameter. It is called again for every combination of earlier values.
    """

    def extend(point: dict[str, Any], rest: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
        if not rest:
            yield point
            return
        first, others = rest[0], rest[1:]
        own = values(first) if first.is_active(point) else []
        for value in own:
            yield from extend({**point, first.name: value}, others)
        if not own:
            yield from extend(point, others)

    yield from extend({}, parameters)


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
