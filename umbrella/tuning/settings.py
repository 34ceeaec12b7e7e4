"""Settings of a sweep."""

from typing import Any, Literal

from pydantic import Field

from umbrella.base import Section


class TuneSettings(Section):
    """A question asked of Ray Tune."""

    space: dict[str, dict[str, Any]] = Field({})
    """What is swept: a setting's name to {grid: [...]}, {choice: [...]}, {uniform: [low, high]}, {loguniform: [low, high]}, {quniform: [low, high, step]} or {randint: [low, high]}, ends included; when: {other name: [its values]} beside it for a condition."""  # noqa: E501
    search: Literal["grid_and_random", "optuna"] = "grid_and_random"
    """Every combination of the grids, the rest drawn at random; or optuna: TPE, which learns from the trials before."""
    samples: int = Field(1, ge=1)
    """Draws from the space, each with every combination of the grids; with optuna how many points it proposes."""
    seeds: int = Field(1, ge=1)
    """Runs of each point, with seeds from ``seed`` on; optuna is told their mean."""
    hours: float = Field(0, ge=0)
    """After so many hours no trial starts and those that run are stopped. 0: no limit."""
    metric: str = "eval/balanced_accuracy"
    """What decides: eval/balanced_accuracy (subjects), eval/<target>/balanced_accuracy, eval/loss."""
    mode: Literal["max", "min"] = "max"
    """Whether more of the metric is better, or less."""
    scheduler: Literal["asha", "none"] = "asha"
    """What stops trials early: asha, which stops those that are behind the best at its rungs; or none."""
    grace: int = Field(2, ge=1)
    """Evaluations that every trial gets before asha may stop it."""
    reduction: int = Field(3, ge=2)
    """asha keeps the best 1/reduction of trials at each rung."""
    concurrent: int = Field(0, ge=0)
    """Trials at once. 0: as many as the resources allow."""
