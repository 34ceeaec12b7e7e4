"""What a sweep has set is read from what it acts on; a value that did not arrive is found and named."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.data.masking import loss_weights
from umbrella.data.pipeline import Plan
from umbrella.model.selection import parts
from umbrella.training.checkpoint import restore
from umbrella.training.optimizer import build_optimizer, build_schedule, rate_factor
from umbrella.training.readback import Acting, read_back

NAMES = ("two", "three", "none")
SET = {
    "optim.lr": 3e-3,
    "optim.embedder_lr": 1e-4,
    "optim.weight_decay": 0.1,
    "optim.warmup": 1,
    "optim.schedule": "linear",
    "mask.turn_header": True,
    "mask.supervise": "assistant",
    "model.train": "embedder+projector",
    "model.width": 16,
    "model.language_layers": 2,
    "train.batch_size": 3,
    "train.accumulate": 1,
    "train.epochs": 2,
    "seed": 7,
}


@pytest.fixture
def acting(
    build: Callable[..., Any], batch_of: Callable[..., Any], examples: dict[str, Any], modalities: Any
) -> Acting:
    """A training at its first step, with settings of every kind."""
    own = {"modalities": {name: modality.model_dump() for name, modality in modalities.items()}}
    settings = load_settings(overrides=SET).model_copy(update={"modalities": modalities})
    settings = type(settings).model_validate(settings.model_dump(mode="json") | own)
    model = build(train="embedder+projector", width=16, language_layers=2)
    optimizer = build_optimizer(model, settings.optim)
    schedule = build_schedule(optimizer, settings.optim, 6)
    plan = Plan(size=9, seed=7, epochs=2, workers=1, batch_size=3, accumulate=1, sorted_by=0, lengths=None, window=1)
    batch, of = batch_of(*NAMES), [examples[name] for name in NAMES]
    for row, example in zip(batch.loss_weights, of, strict=True):
        row[: len(example.input_ids)] = torch.from_numpy(loss_weights(example, settings.mask))
    return Acting(settings, model, parts(model), optimizer, schedule, 6, plan, [batch], of, torch.float32)


def test_every_value_is_read_where_it_acts(acting: Acting) -> None:
    grid = list(acting.settings.modalities["sMRI"].grid)
    swept = SET | {"modalities.sMRI.grid": grid, "model.dtype": "float32"}
    found, blind = read_back(acting, swept)
    assert {name: found[name] for name in SET} == SET
    assert blind == []


def test_a_setting_that_nothing_shows_is_named(acting: Acting) -> None:
    found, blind = read_back(acting, {"optim.clip": 1.0, "optim.lr": 3e-3})
    assert blind == ["optim.clip"]
    assert found["optim.clip"] == acting.settings.optim.clip == 1.0


def test_values_as_yaml_writes_them_are_the_same(acting: Acting) -> None:
    assert read_back(acting, {"optim.lr": "3e-3"})[0] == {"optim.lr": 3e-3}


def wrong_rate(acting: Acting) -> Acting:
    acting.optimizer.param_groups[-1]["initial_lr"] = 1e-5
    return acting


def wrong_schedule(acting: Acting) -> Acting:
    constant = acting.settings.optim.model_copy(update={"schedule": "constant"})
    return replace(acting, schedule=build_schedule(build_optimizer(acting.model, acting.settings.optim), constant, 6))


def wrong_weights(acting: Acting) -> Acting:
    acting.batches[0].loss_weights[0, 3] += 1
    return acting


def wrong_parts(acting: Acting) -> Acting:
    for weight in acting.parts["tower"]:
        weight.requires_grad_(True)
    return acting


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (wrong_rate, "optim.lr"),
        (wrong_schedule, "optim.schedule"),
        (wrong_weights, "mask.supervise"),
        (wrong_parts, "model.train"),
        (lambda acting: replace(acting, plan=replace(acting.plan, seed=8)), "seed"),
        (lambda acting: replace(acting, batches=acting.batches * 2), "train.accumulate"),
    ],
)
def test_a_value_that_did_not_arrive_is_found(acting: Acting, spoil: Callable[[Acting], Acting], name: str) -> None:
    read_back(acting, {name: SET[name]})
    with pytest.raises(UserError, match=rf"^tune\.space\.{name}: was to be {re.escape(str(SET[name]))} and is "):
        read_back(spoil(acting), {name: SET[name]})


def test_a_training_that_goes_on_under_another_rate_has_it(
    build: Callable[..., Any], save_step: Callable[..., Any], tmp_path: Any
) -> None:
    class Training:
        def __init__(self, rate: float) -> None:
            self.settings = load_settings(overrides={"optim.lr": rate, "optim.warmup": 1}).optim
            self.model = build(train="embedder")
            self.optimizer = build_optimizer(self.model, self.settings)
            self.schedule = build_schedule(self.optimizer, self.settings, 6)

    one = Training(1e-2)
    for _ in range(3):
        one.optimizer.step()
        one.schedule.step()
    step = save_step(tmp_path, one, 3)
    other = Training(5e-3)
    restore(step, other.model, [name for name, _ in other.model.named_parameters()], other.optimizer, other.schedule)
    for ahead in (3, 4):
        rates = {group["lr"] for group in other.optimizer.param_groups}
        assert rates == {5e-3 * rate_factor(ahead, other.settings, 6)}
        other.optimizer.step()
        other.schedule.step()
