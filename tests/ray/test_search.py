"""Ray Tune runs the Optuna search: on trials that only count, in actors that are used again."""

import sys
from pathlib import Path
from typing import Any

import pytest
from optuna import load_study
from optuna.storages import InMemoryStorage
from ray import cloudpickle, tune

from umbrella.config import load_settings
from umbrella.tuning.search import count_trials, make_optuna_search, make_scheduler
from umbrella.tuning.search_space import read_space

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import tests


class Counting(tune.Trainable):
    """It is worse with each evaluation, as in overfitting; its first gives no number, and at seed 1 it then fails."""

    def setup(self, config: dict[str, Any]) -> None:
        self.config, self.count = config, 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        self.count += 1
        if self.count == 2 and self.config["seed"] == 1:
            raise ValueError("a trial that fails")
        metric, best = (float("nan") if self.count == 1 else self.config["optim.lr"] * n for n in (self.count, 2))
        report = {"eval/loss": metric, "best/eval/loss": best, "count": self.count, "evaluation": self.count}
        return report | {"done": self.count >= 4}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        (Path(checkpoint_dir) / "count").write_text(str(self.count))

    def load_checkpoint(self, checkpoint: str) -> None:
        self.count = int((Path(checkpoint) / "count").read_text())


class Interrupt(tune.Callback):
    """Raises as if the script were stopped while the third trial runs; once: there is a file afterwards."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        if len(trials) == 3 and trials[-1].last_result and not self.file.exists():
            self.file.touch()
            raise KeyboardInterrupt


def make_tuner(folder: Path, storage: InMemoryStorage | None = None, interrupt: bool = False) -> Any:
    space = {"optim.lr": {"loguniform": [1e-5, 1e-3]}, "optim.clip": {"choice": [1.0, 2.0]}}
    values = {"space": space, "metric": "eval/loss", "mode": "min", "search": "optuna", "samples": 3, "seeds": 2}
    settings = load_settings(overrides={f"tune.{name}": value for name, value in values.items()})
    return tune.Tuner(
        tune.with_resources(Counting, {"CPU": 0.5}),  # the process of an interrupted trial keeps its share
        tune_config=tune.TuneConfig(
            metric="eval/loss",
            mode="min",
            search_alg=make_optuna_search(settings, read_space(settings), storage),
            num_samples=count_trials(settings),
            max_concurrent_trials=1,  # which trial ends first is then no matter of chance
            scheduler=make_scheduler(settings.tune),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=str(folder),
            callbacks=[Interrupt(folder / "interrupted")] if interrupt else None,
            verbose=0,
        ),
    )


def configs(results: Any) -> list[dict[str, Any]]:
    return [dict(result.config) for result in results]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, ray_session: Any) -> tuple[Any, InMemoryStorage]:
    """Results of a search over three points with two seeds, and what Optuna was told."""
    storage = InMemoryStorage()
    return make_tuner(tmp_path_factory.mktemp("swept"), storage).fit(), storage


def test_optuna_runs_each_point_with_every_seed_despite_failures_and_nan(swept: Any) -> None:
    results, storage = swept
    found = configs(results)
    assert [config.pop("seed") for config in found] == [0, 1] * 3
    assert found[0::2] == found[1::2]
    assert len({str(config) for config in found}) == 3
    assert len(results.errors) == 3, "each at its second seed"
    told = [trial.value for trial in load_study(study_name="optuna", storage=storage).trials]
    best = [2 * config["optim.lr"] for config in found[::2]]
    assert told == pytest.approx(best), "the best evaluations of the seeds that did not fail"


def test_resumed_search_proposes_the_points_of_an_uninterrupted_one(
    swept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")
    with pytest.raises(KeyboardInterrupt):
        make_tuner(tmp_path, interrupt=True).fit()
    results = tune.Tuner.restore(str(tmp_path / "search"), Counting).fit()
    assert sorted(map(str, configs(results))) == sorted(map(str, configs(swept[0])))
