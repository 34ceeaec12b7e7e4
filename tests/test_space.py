"""The search space: the settings' own names and types, checked before anything starts."""

from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.config import Settings, load_settings
from umbrella.tuning.space import build_space, count_trials, grid_points, label, possible_values


def sweep(samples: int = 1, **space: dict[str, Any]) -> Settings:
    """Settings with a space; ``__`` in a name is a dot."""
    entries = {f"tune.space.{name.replace('__', '.')}": entry for name, entry in space.items()}
    return load_settings(overrides=entries | {"tune.samples": samples})


def draws(domain: Any) -> list[Any]:
    return domain.sample(size=200, random_state=0)


def test_every_kind_becomes_rays() -> None:
    space = build_space(
        sweep(
            mask__supervise={"grid": ["all", "assistant"]},
            model__width={"choice": [16, 32]},
            optim__weight_decay={"uniform": [0, 0.5]},
            optim__lr={"loguniform": [1e-4, 1e-2]},
            train__epochs={"uniform": [1, 3]},
            optim__warmup={"loguniform": [1, 4]},
        )
    )
    assert space["mask.supervise"] == {"grid_search": ["all", "assistant"]}
    assert space["model.width"].categories == [16, 32]
    decays, rates = draws(space["optim.weight_decay"]), draws(space["optim.lr"])
    assert 0 <= min(decays) < 0.1 < 0.4 < max(decays) <= 0.5
    assert 1e-4 <= min(rates) < 3e-4 < 3e-3 < max(rates) <= 1e-2
    assert 0.3 < sum(rate < 1e-3 for rate in rates) / 200 < 0.7  # as many below the geometric mean as above
    # Whole numbers stay whole, and the upper end is one of them.
    assert set(draws(space["train.epochs"])) == {1, 2, 3}
    assert set(draws(space["optim.warmup"])) == {1, 2, 3, 4}


@pytest.mark.parametrize("kind", ["grid", "choice", "uniform", "loguniform"])
def test_a_rate_that_yaml_reads_as_text_is_a_number_in_the_space(kind: str) -> None:
    settings = sweep(optim__lr={kind: ["1e-4", "1e-2"]})
    domain: Any = build_space(settings)["optim.lr"]
    if kind in ("grid", "choice"):
        assert (domain["grid_search"] if kind == "grid" else domain.categories) == [0.0001, 0.01]
        assert possible_values(settings, "optim.lr") == [0.0001, 0.01]
    else:
        assert (domain.lower, domain.upper) == (0.0001, 0.01)
    if kind == "grid":
        assert grid_points(settings) == [{"optim.lr": 0.0001}, {"optim.lr": 0.01}]


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("optim.learning_rate", {"grid": [1]}, "optim.learning_rate: there is no such setting"),
        ("optim.lr", {"grid": [0.1, -1]}, "optim.lr=-1: Input should be greater than 0"),
        ("mask.supervise", {"choice": ["some"]}, "mask.supervise='some': Input should be 'assistant'"),
        ("optim.lr", {"normal": [0, 1]}, "{'normal': [0, 1]} is none of grid, choice, uniform, loguniform"),
        ("optim.lr", {"grid": [1], "choice": [1]}, "is none of grid, choice"),
        ("optim.lr", {}, "{} is none of grid"),
        ("optim.lr", {"grid": []}, "grid takes a list of at least one value, not []"),
        ("optim.lr", {"grid": 0.1}, "grid takes a list of at least one value, not 0.1"),
        ("optim.lr", {"uniform": [0.1, 0.1]}, "uniform takes [low, high] with low < high"),
        ("optim.lr", {"uniform": [0.1, 0.2, 0.3]}, "uniform takes [low, high]"),
        ("optim.weight_decay", {"loguniform": [0, 0.1]}, "low < high and low > 0"),
        ("mask.supervise", {"uniform": ["all", "assistant"]}, "uniform takes [low, high], two numbers"),
        ("mask.end_of_turn", {"uniform": [False, True]}, "uniform takes [low, high], two numbers"),
        ("data.train", {"grid": ["a", "b"]}, "data settings are the same for every trial and cannot be swept"),
        ("resources.workers", {"grid": [1, 2]}, "resources settings are the same for every trial"),
        ("experiment", {"grid": ["a"]}, "experiment settings are the same for every trial"),
    ],
)
def test_what_cannot_be_swept_is_refused_by_name(name: str, entry: dict[str, Any], message: str) -> None:
    settings = load_settings(overrides={f"tune.space.{name}": entry})
    with pytest.raises(UserError) as caught:
        build_space(settings)
    assert str(caught.value).startswith(f"tune.space.{name}: ")
    assert message in str(caught.value)


def test_a_setting_given_on_the_command_line_is_not_swept() -> None:
    space = {"optim__lr": {"grid": [0.1, 0.2]}, "mask__supervise": {"grid": ["all", "assistant", "last_assistant"]}}
    settings = sweep(samples=2, **space)
    given = frozenset({"optim.lr"})
    assert list(build_space(settings, given)) == ["mask.supervise"]
    assert (count_trials(settings), count_trials(settings, given)) == (12, 6)
    assert grid_points(settings, given) == [{"mask.supervise": v} for v in ("all", "assistant", "last_assistant")]
    assert possible_values(settings, "optim.lr", given) == [Settings().optim.lr]


def test_what_is_drawn_counts_once_per_sample_and_is_shown_as_its_range() -> None:
    settings = sweep(samples=3, optim__lr={"loguniform": [0.001, 0.1]}, mask__supervise={"grid": ["all", "assistant"]})
    assert count_trials(settings) == 6
    assert [label(point) for point in grid_points(settings)] == [
        "lr={'loguniform': [0.001, 0.1]} supervise=all",
        "lr={'loguniform': [0.001, 0.1]} supervise=assistant",
    ]
    assert possible_values(settings, "optim.lr") == [Settings().optim.lr]


def test_a_trial_in_words() -> None:
    assert label({"optim.lr": 0.00012345, "mask.supervise": "all", "train.epochs": 3}) == (
        "lr=0.000123 supervise=all epochs=3"
    )
    assert label({}) == "as set"
