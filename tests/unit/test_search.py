"""The trials of a sweep: the points of grid and random search, and Optuna's proposals."""

import math
from pathlib import Path
from typing import Any

import pytest
from optuna import load_study
from optuna.storages import InMemoryStorage
from ray.tune.search import ConcurrencyLimiter, Searcher, SearchGenerator

from umbrella.base import UserError
from umbrella.config import Settings, load_settings
from umbrella.tuning.search import SeedRepeater, count_trials, list_points, make_optuna_search, make_scheduler
from umbrella.tuning.search_space import format_point, read_space

METRIC = "eval/balanced_accuracy"
BEST = f"best/{METRIC}"
OF_RAY = {"cluster", "runtime_env"}  # files for Ray itself
CONFIGS = (Path(__file__).resolve().parents[2] / "ray_configs").glob("*.yaml")
SETTINGS_FILES = sorted(file for file in CONFIGS if file.stem not in OF_RAY)
RATES = {"loguniform": [1e-5, 1e-3]}
PARTS = {
    "optim.lr": RATES,
    "model.train": {"grid": ["embedder", "lora", "all"]},
    "optim.embedder_lr": RATES | {"when": {"model.train": ["embedder", "all"]}},
    "model.lora_rank": {"grid": [4, 8], "when": {"model.train": ["lora"]}},
}


def sweep(space: dict[str, dict[str, Any]], **tune: Any) -> Settings:
    return load_settings(overrides={"tune.space": space} | {f"tune.{name}": value for name, value in tune.items()})


def test_points_are_all_combinations_of_the_grids_each_with_new_samples() -> None:
    settings = sweep({"optim.lr": RATES, "mask.supervise": {"grid": ["all", "assistant"]}}, samples=3)
    found = list_points(settings)
    assert [point["mask.supervise"] for point in found] == ["all", "assistant"] * 3
    assert len({point["optim.lr"] for point in found}) == 6
    assert list_points(settings) == found
    assert list_points(settings.with_values({"seed": 1})) != found
    grids = sweep({"optim.lr": {"grid": [0.1, 0.2]}, "mask.supervise": {"grid": ["all", "assistant"]}})
    pairs = [(0.1, "all"), (0.1, "assistant"), (0.2, "all"), (0.2, "assistant")]
    assert [tuple(point.values()) for point in list_points(grids)] == pairs


def test_a_conditional_setting_is_in_a_point_only_if_its_conditions_hold() -> None:
    found = list_points(sweep(PARTS, samples=2))
    names = [(point["model.train"], *(name for name in point if name != "model.train")) for point in found]
    assert (
        names
        == [
            ("embedder", "optim.lr", "optim.embedder_lr"),
            ("lora", "optim.lr", "model.lora_rank"),
            ("lora", "optim.lr", "model.lora_rank"),
            ("all", "optim.lr", "optim.embedder_lr"),
        ]
        * 2
    )


def test_conditions_can_depend_on_conditional_settings() -> None:
    space = {
        "optim.clip": {"grid": [1.0, 2.0], "when": {"optim.schedule": ["linear"], "optim.warmup": [5]}},
        "optim.warmup": {"grid": [0, 5], "when": {"mask.supervise": ["all"]}},
        "mask.supervise": {"choice": ["all"]},
        "optim.schedule": {"grid": ["linear", "cosine"]},
    }
    assert [format_point(point) for point in list_points(sweep(space))] == [
        "warmup=0 supervise=all schedule=linear",
        "clip=1 warmup=5 supervise=all schedule=linear",
        "clip=2 warmup=5 supervise=all schedule=linear",
        "warmup=0 supervise=all schedule=cosine",
        "warmup=5 supervise=all schedule=cosine",
    ]


def test_each_point_runs_once_with_each_seed_without_the_settings_of_the_command_line() -> None:
    space = {"optim.lr": {"grid": [0.1, 0.2]}, "mask.supervise": {"choice": ["all"]}}
    settings = sweep(space, samples=4, seeds=3).with_values({"seed": 7})
    assert list_points(settings, frozenset({"mask.supervise"})) == [
        {"optim.lr": rate, "seed": seed} for rate in (0.1, 0.2) for seed in (7, 8, 9)
    ]
    assert count_trials(settings) == 6
    assert list_points(sweep(space), frozenset(space)) == [{}]


def test_every_point_has_another_name() -> None:
    found = list_points(sweep(PARTS, samples=100, seeds=2))
    # Two samples of four digits may be equal, and are then one point.
    assert len({format_point(point) for point in found}) == len(found) > 790


def optuna_search(space: dict[str, dict[str, Any]], storage: Any = None, **tune: Any) -> SeedRepeater:
    settings = sweep(space, search="optuna", **tune)
    return make_optuna_search(settings, read_space(settings), storage)


def run(search: Searcher, trial_id: str, best: float | None, error: bool = False) -> dict[str, Any]:
    """Run a trial with a searcher, as Ray Tune does. ``best``: its last report; None: there was no report."""
    point = search.suggest(trial_id)
    assert isinstance(point, dict)
    search.on_trial_complete(trial_id, None if best is None else {METRIC: 0.0, BEST: best}, error=error)
    return point


def trials(storage: InMemoryStorage) -> list[tuple[str, float | None]]:
    """State and value of each trial of Optuna."""
    study = load_study(study_name="optuna", storage=storage)
    return [(trial.state.name, trial.value) for trial in study.trials]


def test_optunas_proposals_depend_on_the_seed_only_and_follow_conditions() -> None:
    first, again = optuna_search(PARTS), optuna_search(PARTS)
    found = [run(first, str(number), 0.5) for number in range(15)]
    assert [run(again, str(number), 0.5) for number in range(15)] == found
    assert {point["model.train"] for point in found} == {"embedder", "lora", "all"}
    for point in found:
        assert ("model.lora_rank" in point) == (point["model.train"] == "lora")
        assert ("optim.embedder_lr" in point) == (point["model.train"] != "lora")
        assert list(point) == [name for name in PARTS if name in point]
        sweep(PARTS).with_values(point)


def test_optuna_proposes_values_of_every_kind_in_the_type_of_the_setting() -> None:
    kinds = {
        "optim.clip": {"quniform": [0.1, 0.5, 0.2]},
        "train.epochs": {"randint": [1, 3]},
        "optim.warmup": {"loguniform": [1, 4]},
        "modalities.T1/T2": {"choice": [{"grid": [32] * 3, "patch": [16] * 3}, {"patch": [4] * 3}]},
    }
    settings = sweep({}).with_values({"modalities": {"T1/T2": {"grid": [8, 8, 8], "patch": [8, 8, 8]}}})
    settings = settings.with_values({"tune.space": kinds})
    search = make_optuna_search(settings, read_space(settings))
    found = [run(search, str(number), 0.0) for number in range(25)]
    assert {point["optim.clip"] for point in found} == {0.1, 0.3, 0.5}
    assert {point["train.epochs"] for point in found} == {1, 2, 3}
    assert {point["optim.warmup"] for point in found} == {1, 2, 3, 4}
    assert {str(point["modalities.T1/T2"]) for point in found} == {str(v) for v in kinds["modalities.T1/T2"]["choice"]}


def test_optuna_gets_the_mean_of_the_best_evaluations_over_the_seeds_that_did_not_fail() -> None:
    storage = InMemoryStorage()
    search = optuna_search({"optim.lr": RATES}, storage, seeds=3)
    first, second, third = run(search, "a", 0.9, error=True), run(search, "b", 0.2), run(search, "c", 0.4)
    assert [point.pop("seed") for point in (first, second, third)] == [0, 1, 2]
    assert first == second == third
    search.on_trial_complete("a", {BEST: 1.0})  # once more, as after Tuner.restore
    search.on_trial_complete("never seen", {BEST: 1.0})
    assert trials(storage) == [("COMPLETE", pytest.approx(0.3))]
    assert run(search, "d", 0.1)["optim.lr"] != first["optim.lr"]
    assert trials(storage)[1] == ("RUNNING", None), "its other seeds have not run"


@pytest.mark.parametrize(("best", "error"), [(None, True), (None, False), (math.nan, False), (-math.inf, False)])
def test_a_trial_without_a_finite_metric_is_pruned(best: float | None, error: bool) -> None:
    storage = InMemoryStorage()
    search = optuna_search({"optim.lr": RATES}, storage)
    for number in range(3):
        run(search, f"{number}", best, error)
    assert trials(storage) == [("PRUNED", None)] * 3
    for number in range(10):  # beyond the first ten, which are random
        run(search, f"more{number}", 0.5)
    assert trials(storage)[3:] == [("COMPLETE", 0.5)] * 10


def test_optuna_gets_a_point_when_the_last_of_its_concurrent_runs_ends() -> None:
    storage = InMemoryStorage()
    search = optuna_search({"optim.lr": RATES}, storage, seeds=2)
    for trial_id in "abcd":
        search.suggest(trial_id)
    values = []
    for trial_id, best in zip("acdb", [0.1, 0.2, 0.4, 0.3], strict=True):
        search.on_trial_complete(trial_id, {BEST: best})
        values.append([value for _, value in trials(storage)])
    assert values[:2] == [[None, None]] * 2
    assert values[2:] == [[None, pytest.approx(0.3)], [pytest.approx(0.2), pytest.approx(0.3)]]


def wrap_as_ray_does(search: Searcher) -> SearchGenerator:
    return SearchGenerator(ConcurrencyLimiter(search, max_concurrent=1))


@pytest.mark.parametrize("newer", ["the search's", "Ray's"])
def test_a_kill_between_writing_the_two_files_of_a_search_changes_no_proposal(tmp_path: Path, newer: str) -> None:
    straight, search, restored = (optuna_search(PARTS, seeds=2) for _ in range(3))
    for one in (straight, search):
        run(one, "a", 0.5)
    wrapped = wrap_as_ray_does(search)
    wrapped.save_to_dir(str(tmp_path), "session")
    (own,) = tmp_path.glob("searcher-state-*")
    earlier = own.read_bytes()
    run(search, "b", 0.7)
    if newer == "the search's":
        search.save_to_dir(str(tmp_path), "session")
        run(straight, "b", 0.7)
    else:
        wrapped.save_to_dir(str(tmp_path), "session")
        own.write_bytes(earlier)
    wrap_as_ray_does(restored).restore_from_dir(str(tmp_path))
    later = [run(restored, f"later{number}", 0.6) for number in range(4)]
    assert [run(straight, f"later{number}", 0.6) for number in range(4)] == later


def test_optuna_ends_when_a_categorical_space_is_exhausted() -> None:
    space = {"optim.lr": {"grid": [0.1, 0.2]}, "mask.supervise": {"choice": ["all", "assistant"]}}
    search = optuna_search(space, samples=50, seeds=2)
    assert count_trials(search.settings) == 8
    found = [format_point(run(search, str(number), 0.5)) for number in range(8)]
    assert len(set(found)) == 8
    assert search.suggest("9") == Searcher.FINISHED


def test_invalid_points_are_found_before_the_start_or_skipped_by_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umbrella.tuning.search_space.MAX_CHECKED", 1)  # as if there were too many to check all
    space = {"mask.preset": {"grid": ["", "upstream"]}, "mask.supervise": {"grid": ["all", "assistant"]}}
    with pytest.raises(UserError, match=r"^tune\.space\.mask\.preset: preset=upstream supervise=all are not valid"):
        list_points(sweep(space))
    search = optuna_search(space)
    found = [run(search, str(number), 0.5) for number in range(3)]
    assert {"mask.preset": "upstream", "mask.supervise": "all"} not in found
    assert search.suggest("4") == Searcher.FINISHED


@pytest.mark.parametrize(("name", "kind"), [("asha", "AsyncHyperBandScheduler"), ("none", "FIFOScheduler")])
def test_the_scheduler_is_rays(name: str, kind: str) -> None:
    assert type(make_scheduler(sweep(PARTS, scheduler=name).tune)).__name__ == kind


@pytest.mark.parametrize("file", SETTINGS_FILES, ids=lambda file: file.stem)
def test_every_settings_file_is_valid_and_its_head_has_the_command(file: Path) -> None:
    comments = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(line.startswith("#     umbrella tune") for line in comments)
    assert any(file.name in line for line in comments)
    checkpoint = {"model.checkpoint": "llava"} if file.stem == "embedder" else {}
    counts = {"tune": 4, "numbers": 6, "embedder": 9, "patch_and_grid": 4, "fmri_window": 4, "augmentation": 12}
    assert count_trials(load_settings([file], checkpoint)) == counts.get(file.stem, 1)
