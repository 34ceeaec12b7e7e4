"""Settings of a sweep."""

from typing import Any, Literal

from pydantic import Field

from umbrella.base import Section


class TuneSettings(Section):
    """Settings of a sweep."""

    space: dict[str, dict[str, Any]] = Field({})
    """Search space. Name of a setting to {grid: [...]}, {choice: [...]}, {uniform: [low, high]}, {loguniform: [low, high]}, {quniform: [low, high, step]} or {randint: [low, high]}, bounds included. A condition is added as when: {other name: [its values]}."""  # noqa: E501
    search: Literal["grid_and_random", "optuna"] = "grid_and_random"
    """All combinations of the grids, other values sampled at random; or optuna: TPE, which uses earlier results."""
    samples: int = Field(1, ge=1)
    """Number of random samples, each with all combinations of the grids; with optuna, number of points it proposes."""
    seeds: int = Field(1, ge=1)
    """Runs of each point, with seeds from ``seed`` on; optuna uses their mean."""
    hours: float = Field(0, ge=0)
    """Time limit in hours, after which no trial starts and running trials are stopped. 0: no limit."""
    metric: str = "eval/balanced_accuracy"
    """Metric of the ranking: eval/balanced_accuracy (subjects), eval/<target>/balanced_accuracy, eval/loss, eval/subset_accuracy. A sweep on several targets must name one."""  # noqa: E501
    mode: Literal["max", "min"] = "max"
    """Whether a larger or a smaller metric is better."""
    scheduler: Literal["asha", "none"] = "asha"
    """Early stopping: asha, which stops trials that are worse than others at its rungs; or none."""
    grace: int = Field(2, ge=1)
    """Number of evaluations before asha may stop a trial."""
    reduction: int = Field(3, ge=2)
    """asha keeps the best 1/reduction of the trials at each rung."""
    concurrent: int = Field(0, ge=0)
    """Maximum number of concurrent trials. 0: as many as the resources allow."""
