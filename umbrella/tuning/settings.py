"""Settings of a sweep."""

from typing import Any, Literal

from pydantic import Field

from umbrella.base import Section


class TuneSettings(Section):
    """A question asked of Ray Tune."""

    space: dict[str, dict[str, Any]] = Field({})
    """What is swept: a setting's name to {grid: [...]}, {choice: [...]}, {uniform: [a, b]} or {loguniform: [a, b]}."""
    samples: int = Field(1, ge=1)
    """Draws from the space; a grid is run once per draw."""
    metric: str = "eval/balanced_accuracy"
    """What decides: eval/balanced_accuracy (subjects), eval/<target>/balanced_accuracy, eval/loss."""
    mode: Literal["max", "min"] = "max"
    """Whether more of the metric is better, or less."""
    grace: int = Field(2, ge=1)
    """Evaluations that every trial gets before ASHA may stop it."""
    reduction: int = Field(3, ge=2)
    """ASHA keeps the best 1/reduction of trials at each rung."""
    concurrent: int = Field(0, ge=0)
    """Trials at once. 0: as many as the resources allow."""
