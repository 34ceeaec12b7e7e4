"""The search space: names and types of settings, ranges, conditions, and errors that are found before the start."""

from typing import Any

import numpy as np
import pytest

from umbrella.base import UserError
from umbrella.config import Settings, load_settings
from umbrella.data.settings import MaskPolicy
from umbrella.tuning.search_space import Parameter, format_point, format_value, read_space, variants


def sweep(space: dict[str, dict[str, Any]], **tune: Any) -> Settings:
    return load_settings(overrides={"tune.space": space} | {f"tune.{name}": value for name, value in tune.items()})


def read_one(name: str, parameter: dict[str, Any]) -> Parameter:
    (found,) = read_space(sweep({name: parameter}))
    return found


def samples(name: str, parameter: dict[str, Any]) -> list[Any]:
    rng, found = np.random.default_rng(0), read_one(name, parameter)
    return [found.sample(rng) for _ in range(300)]


def test_ranges_are_sampled_uniformly_or_uniformly_in_the_logarithm() -> None:
    decays = samples("optim.weight_decay", {"uniform": [0, 0.5]})
    assert 0 <= min(decays) < 0.1 < 0.4 < max(decays) <= 0.5
    rates = samples("optim.lr", {"loguniform": [1e-4, 1e-2]})
    assert 1e-4 <= min(rates) < 3e-4 < 3e-3 < max(rates) <= 1e-2
    assert 0.4 < np.mean(np.array(rates) < 1e-3) < 0.6  # as many below the geometric mean as above
    assert all(float(f"{rate:.4g}") == rate for rate in rates)


@pytest.mark.parametrize(
    ("name", "parameter", "values"),
    [
        ("train.epochs", {"randint": [1, 3]}, {1, 2, 3}),
        ("train.epochs", {"uniform": [1, 3]}, {1, 2, 3}),
        ("optim.warmup", {"loguniform": [1, 4]}, {1, 2, 3, 4}),
        ("train.augment.rotate", {"randint": [0, 2]}, {0.0, 1.0, 2.0}),
        ("model.width", {"quniform": [16, 64, 16]}, {16, 32, 48, 64}),
        ("optim.clip", {"quniform": [0.1, 0.5, 0.2]}, {0.1, 0.3, 0.5}),
        ("optim.clip", {"quniform": [0.1, 0.6, 0.2]}, {0.1, 0.3, 0.5}),  # 0.6 is no step
    ],
)
def test_whole_numbers_and_steps_include_both_ends_in_the_type_of_the_setting(
    name: str, parameter: dict[str, Any], values: set
) -> None:
    found = samples(name, parameter)
    assert set(found) == values
    assert {type(value) for value in found} == {type(value) for value in values}


@pytest.mark.parametrize("kind", ["grid", "choice", "uniform", "loguniform"])
def test_a_number_that_yaml_reads_as_text_is_a_number(kind: str) -> None:
    assert read_one("optim.lr", {kind: ["1e-4", "1e-2"]}).values == [0.0001, 0.01]


def test_values_may_be_lists_or_parts_of_sections() -> None:
    assert read_one("modalities.fMRI.grid", {"grid": [[16, 16, 16, 6], [16, 16, 16, 12]]}).values[0] == [16, 16, 16, 6]
    assert read_one("optim", {"choice": [{"lr": "1e-4", "warmup": 5}]}).values == [{"lr": 0.0001, "warmup": 5}]
    shape = {"grid": [32, 32, 32], "patch": [16, 16, 16]}
    assert read_one("modalities.sMRI", {"grid": [shape]}).values == [shape]


@pytest.mark.parametrize(
    ("name", "parameter", "message"),
    [
        ("optim.learning_rate", {"grid": [1]}, "optim.learning_rate: there is no such setting"),
        ("optim.lr", {"grid": [0.1, -1]}, "optim.lr=-1: Input should be greater than 0"),
        ("mask.supervise", {"choice": ["some"]}, "mask.supervise='some': Input should be 'assistant'"),
        ("model.embedder_init", {"grid": ["inflated"]}, "embedder_init=inflated needs a model.checkpoint"),
        ("optim.lr", {"normal": [0, 1]}, "{'normal': [0, 1]} must have one of grid, choice, uniform, loguniform"),
        ("optim.lr", {"grid": [1], "choice": [1]}, "as in {grid: [1, 2]}, and only when beside it"),
        ("optim", {"lr": {"grid": [1]}, "clip": {}}, "with dots; write optim.clip: {...}, optim.lr: {...}"),
        ("modalities.sMRI", {"grid": {"grid": [[8] * 3]}}, "with dots; write modalities.sMRI.grid: {...}"),
        ("optim.lr", {"grid": []}, "grid takes a list of at least one value, not []"),
        ("optim.lr", {"grid": 0.1}, "grid takes a list of at least one value, not 0.1"),
        ("optim.lr", {"uniform": [0.1, 0.1]}, "uniform takes [low, high] with low < high, not [0.1, 0.1]; for a list"),
        ("optim.lr", {"uniform": [0.1, 0.2, 0.3]}, "for a list of values use grid or choice"),
        ("optim.weight_decay", {"loguniform": [0, 0.1]}, "loguniform takes [low, high] with 0 < low < high"),
        ("mask.end_of_turn", {"uniform": [False, True]}, "uniform takes [low, high] with"),
        ("optim.clip", {"quniform": [1, 2]}, "quniform takes [low, high, step] with"),
        ("optim.clip", {"quniform": [1, 2, 3]}, "and 0 < step <= high - low"),
        ("optim.clip", {"quniform": [1, 2, "wide"]}, "not [1, 2, 'wide']"),
        ("model.width", {"quniform": [16, 32, 0.5]}, "all of them whole numbers, not [16, 32, 0.5]"),
        ("optim.clip", {"randint": [0.5, 2]}, "two whole numbers, both of them included"),
        ("data.train", {"grid": ["a", "b"]}, "data settings are the same for every trial and cannot be swept"),
        ("resources.workers", {"grid": [1, 2]}, "resources settings are the same for every trial"),
        ("modalities.sMRI.patch", {"grid": [[7, 8, 8]]}, "patch (7, 8, 8) does not divide grid (24, 24, 24)"),
        ("modalities.sMRI.background", {"uniform": [0, 1]}, "list the values, as a grid"),
        ("optim.lr", {"grid": [1], "when": "always"}, "when takes names and values, as in {model.train:"),
        ("optim.lr", {"grid": [1], "when": {"model.train": ["all"]}}, "when: model.train is not swept by a grid or a"),
        ("optim.lr", {"grid": [1], "when": {"optim.lr": [1]}}, "when: optim.lr is not swept by a grid or a choice"),
    ],
)
def test_an_invalid_parameter_is_refused_with_its_name(name: str, parameter: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_space(sweep({name: parameter}))
    assert str(caught.value).startswith(f"tune.space.{name}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


MASK = {"grid": ["all", "assistant"]}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"mask.supervise": MASK, "optim.lr": {"grid": [1], "when": {"mask.supervise": ["last_assistant"]}}},
            "tune.space.optim.lr: when: mask.supervise is never last_assistant; its values are all, assistant",
        ),
        (
            {
                "optim.lr": {"grid": [1, 2], "when": {"optim.clip": [3]}},
                "optim.clip": {"grid": [3, 4], "when": {"optim.lr": [1]}},
            },
            "tune.space.optim.lr: conditions of optim.clip, optim.lr form a cycle; remove one of them",
        ),
        (
            {"optim.clip": {"uniform": [1, 2]}, "optim.lr": {"grid": [1], "when": {"optim.clip": [1]}}},
            "tune.space.optim.lr: when: optim.clip is not swept by a grid or a choice",
        ),
        (
            {"optim.clip": {"grid": [1, 2]}, "optim.lr": {"grid": [1], "when": {"optim.clip": ["one"]}}},
            "tune.space.optim.lr: when: optim.clip='one': Input should be a valid number, unable to parse string as a"
            " number; write its values as a list, optim.clip: [1.0, 2.0]",
        ),
        (
            {
                "modalities.fMRI.grid": {"grid": [[16, 16, 16, 6], [16, 16, 16, 12]]},
                "optim.lr": {"grid": [1], "when": {"modalities.fMRI.grid": [[16, 16, 16]]}},
            },
            "tune.space.optim.lr: when: modalities.fMRI: grid (16, 16, 16) and patch (8, 8, 8, 3) have different"
            " numbers of axes; write its values as a list, modalities.fMRI.grid: [[16, 16, 16, 6], [16, 16, 16, 12]]",
        ),
        (
            {"modalities.sMRI.grid": {"grid": [[24] * 3, [32] * 3]}, "modalities.sMRI.patch": {"grid": [[6] * 3]}},
            "tune.space.modalities.sMRI.grid: sMRI.grid=32x32x32 sMRI.patch=6x6x6 are not valid together:"
            " modalities.sMRI: patch (6, 6, 6) does not divide grid (32, 32, 32) along every axis;"
            " leave such values out, or sweep",
        ),
        (
            {"modalities.sMRI": {"grid": [{"patch": [6] * 3}]}, "modalities.sMRI.grid": {"grid": [[24] * 3]}},
            "tune.space.modalities.sMRI.grid: is part of modalities.sMRI, which is swept too",
        ),
    ],
)
def test_parameters_that_are_not_valid_together_are_refused(space: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_space(sweep(space))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_values_that_are_valid_only_with_other_swept_values_are_accepted() -> None:
    grids = {"grid": [[30] * 3, [60] * 3]}
    read_space(sweep({"modalities.sMRI.grid": grids, "modalities.sMRI.patch": {"grid": [[15] * 3]}}))  # of 24 none is
    only = {"grid": ["inflated"], "when": {"model.checkpoint": ["llava"]}}
    read_space(sweep({"model.checkpoint": {"grid": ["", "llava"]}, "model.embedder_init": only}))


def test_seeds_are_swept_in_one_way() -> None:
    with pytest.raises(UserError, match=r"^tune\.space\.seed: tune\.seeds sets the seed"):
        read_space(sweep({"seed": {"grid": [0, 1]}}, seeds=2))


def masks(settings: Settings) -> list[MaskPolicy]:
    return [variant.mask for variant in variants(settings, read_space(settings), "mask")]


def test_variants_are_the_combinations_of_a_section_that_trials_can_have() -> None:
    settings = sweep(
        {
            "mask.supervise": {"choice": ["all", "assistant"]},
            "model.train": {"grid": ["embedder", "all"]},
            "optim.lr": {"loguniform": [0.1, 0.2]},
            "mask.task_weights.T1": {"uniform": [1.0, 2.0]},
            "mask.turn_header": {"grid": [True, False], "when": {"model.train": ["all"], "mask.supervise": ["all"]}},
        }
    )
    assert {(mask.supervise, mask.turn_header) for mask in masks(settings)} == {
        ("all", True), ("all", False), ("assistant", False)
    }  # fmt: skip
    assert variants(settings, read_space(settings), "modalities") == [settings]
    assert masks(load_settings()) == [load_settings().mask]


def test_presets_and_weights_of_masks_are_swept_as_one_value() -> None:
    plain, upstream = masks(sweep({"mask.preset": {"grid": ["", "upstream"]}}))
    assert (plain.turn_header, upstream.turn_header) == (False, True)
    weights = [{"T1": 2.0}, {"T1": 3.0, "T3": 4.0}]
    assert [mask.task_weights for mask in masks(sweep({"mask.task_weights": {"grid": weights}}))] == weights
    with pytest.raises(UserError, match=r"^tune\.space\.mask\..*: mask\.preset=upstream means supervise="):
        masks(sweep({"mask.preset": {"grid": ["", "upstream"]}, "mask.supervise": {"grid": ["all"]}}))


def test_settings_of_the_command_line_are_not_swept_and_decide_conditions() -> None:
    space = {
        "model.train": {"grid": ["embedder", "all"]},
        "optim.embedder_lr": {"grid": [1.0], "when": {"model.train": ["all"]}},
        "optim.clip": {"grid": [1.0, 2.0], "when": {"optim.embedder_lr": [1.0]}},
        "modalities.sMRI": {"grid": [{"patch": [6, 6, 6]}]},
    }
    given = frozenset({"model.train", "modalities.sMRI.grid"})
    fixed = sweep(space).with_values({"model.train": "all"})
    assert [(parameter.name, parameter.when) for parameter in read_space(fixed, given)] == [
        ("optim.embedder_lr", {}),
        ("optim.clip", {"optim.embedder_lr": [1.0]}),
    ]
    assert read_space(fixed.with_values({"model.train": "embedder"}), given) == []


@pytest.mark.parametrize(
    ("point", "text"),
    [
        (
            {"optim.lr": 0.0003, "mask.supervise": "all", "train.epochs": 3, "optim.clip": 0.5, "seed": 1},
            "lr=3e-4 supervise=all epochs=3 clip=0.5 seed=1",
        ),
        ({"modalities.sMRI.grid": [96, 96, 96]}, "sMRI.grid=96x96x96"),  # dMRI and fMRI have one, too
        ({"modalities.sMRI": {"grid": [9, 9, 9], "patch": [3, 3, 3]}}, "sMRI=(grid=9x9x9 patch=3x3x3)"),
        ({"optim.lr": 1e-3, "optim.embedder_lr": 1e-5}, "lr=0.001 embedder_lr=1e-5"),
        ({"mask.task_weights": {"T1": 2.0}, "mask.preset": ""}, 'task_weights=(T1=2) preset=""'),
        ({}, "as set"),
    ],
)
def test_a_point_is_formatted_with_short_unique_names(point: dict[str, Any], text: str) -> None:
    assert format_point(point) == text


@pytest.mark.parametrize("value", [3e-4, 1.2345e-5, 0.001, 0.25, 10.0, 0.0, 1e30, 123456.5, -2e-7])
def test_a_formatted_number_is_short_and_exact(value: float) -> None:
    assert float(format_value(value)) == value
    assert len(format_value(value)) <= 9
