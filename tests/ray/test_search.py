"""Ray Tune takes the searches and schedulers: on trials that only count, in actors that are used again."""

import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle, tune

from umbrella.config import load_settings
from umbrella.tuning.search import make_scheduler, make_search

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import tests


class Counting(tune.Trainable):
    """It is worse with each evaluation, as in overfitting; its first gives no number, and at seed 1 it then fails.

    So it does at a clip of 9.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self.config, self.count = config, 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        self.count += 1
        if self.count == 2 and (self.config.get("seed") == 1 or self.config["optim.clip"] == 9):
            raise ValueError("a trial that fails")
        metric = float("nan") if self.count == 1 else self.config["optim.lr"] * self.count
        return {"eval/loss": metric, "count": self.count, "evaluation": self.count, "done": self.count >= 4}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / "count").write_text(str(self.count))

    def load_checkpoint(self, checkpoint: str) -> None:
        self.count = int((Path(checkpoint) / "count").read_text())


def fit(folder: Path, trial: Any = Counting, max_failures: int = 0, **of_tune: Any) -> Any:
    space = {"optim.lr": {"loguniform": [1e-5, 1e-3]}, "optim.clip": {"choice": [1.0, 2.0]}}
    values = {"space": space, "metric": "eval/loss", "mode": "min"} | of_tune
    settings = load_settings(overrides={f"tune.{name}": value for name, value in values.items()})
    search = make_search(settings)
    return tune.Tuner(
        # One at a time, and in turns where the scheduler says so: which comes first is then no matter of chance.
        tune.with_resources(trial, {"CPU": ray.cluster_resources()["CPU"]}),
        param_space=search.param_space,
        tune_config=tune.TuneConfig(
            metric="eval/loss",
            mode="min",
            search_alg=search.search_alg,
            num_samples=search.num_samples,
            scheduler=make_scheduler(settings.tune),
            reuse_actors=True,
            time_budget_s=240,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=max_failures),
            verbose=0,
        ),
    ).fit()


def test_optunas_points_are_run_with_every_seed_past_failures_and_missing_numbers(tmp_path: Path) -> None:
    results = fit(tmp_path, search="optuna", samples=2, seeds=2)
    configs = [dict(result.config) for result in results]
    assert sorted(config.pop("seed") for config in configs) == [0, 0, 1, 1]
    assert len({tuple(config.items()) for config in configs}) == 2
    assert len(results.errors) == 2
