"""Settings of a sweep."""

from typing import Any, Literal

from pydantic import Field, model_validator

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
    scheduler: Literal["asha", "median", "pbt", "none"] = "asha"
    """What stops trials early: asha (behind the best at its rungs), median (below the median of the others), pbt (the worst go on from the best ones' checkpoints, with other values of ``perturb``), none."""  # noqa: E501
    grace: int = Field(2, ge=1)
    """Evaluations that every trial gets before asha or median may stop it."""
    reduction: int = Field(3, ge=2)
    """asha keeps the best 1/reduction of trials at each rung."""
    perturb: list[str] = Field(["optim.lr"], min_length=1)
    """Swept names that pbt changes on the way, of optim, mask and train.augment."""
    perturb_every: int = Field(2, ge=1)
    """Evaluations between such changes."""
    concurrent: int = Field(0, ge=0)
    """Trials at once. 0: as many as the resources allow."""

    @model_validator(mode="after")
    def _population_is_one(self) -> "TuneSettings":
        if self.scheduler == "pbt" and self.search == "optuna":
            raise ValueError("scheduler=pbt searches by itself; take search=grid_and_random with it")
        if self.scheduler == "pbt" and self.seeds > 1:
            raise ValueError("scheduler=pbt mixes the runs of all seeds; take seeds=1 and more samples with it")
        return self
