"""What a sweep has set is read from what it acts on; a value that did not arrive is found and named."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.data.batching import collate
from umbrella.data.masking import loss_weights
from umbrella.data.pipeline import Plan
from umbrella.model.inflation import inflate
from umbrella.model.selection import parts
from umbrella.training.augmentation import augment
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.readback import read_back
from umbrella.training.readers import Acting
from umbrella.volumes.decoded import DecodedVolumes

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
    "train.augment.shift": 0.1,
    "seed": 7,
}
DRAWS = [(7, 0, 5), (7, 0, 3), (7, 0, 8)]


@pytest.fixture
def acting(
    build: Callable[..., Any], batch_of: Callable[..., Any], examples: dict[str, Any], modalities: Any, tokenizer: Any
) -> Acting:
    """A training at its first step, with settings of every kind."""
    own = {"modalities": {name: modality.model_dump() for name, modality in modalities.items()}}
    settings = load_settings(overrides=SET).model_copy(update={"modalities": modalities})
    settings = type(settings).model_validate(settings.model_dump(mode="json") | own)
    model = build(train="embedder+projector", width=16, language_layers=2)
    optimizer = build_optimizer(model, settings.optim)
    schedule = build_schedule(optimizer, settings.optim, 6)
    plan = Plan(size=9, seed=7, epochs=2, workers=1, batch_size=3, accumulate=1, sorted_by=0, lengths=None, window=1)
    batch, of = batch_of(*NAMES, draws=DRAWS), [examples[name] for name in NAMES]
    for row, example in zip(batch.loss_weights, of, strict=True):
        row[: len(example.input_ids)] = torch.from_numpy(loss_weights(example, settings.mask))
    image_id, pad_id = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id

    def again(settings: Any) -> Any:
        volumes = DecodedVolumes(settings.modalities, settings.data.max_voxels)
        return collate(of, settings.mask, volumes, image_id, pad_id, draws=DRAWS)

    fed = [augment(batch, settings.train.augment)]
    return Acting(settings, model, parts(model), optimizer, schedule, 6, plan, [batch], fed, of, again, torch.float32)


def test_every_value_is_read_where_it_acts(acting: Acting) -> None:
    grid = list(acting.settings.modalities["sMRI"].grid)
    shown = SET | {
        "model.dtype": "float32", "model.embedder_init": "random", "modalities.sMRI.intensity": "zscore",
        "modalities.fMRI.window_stride": 1,
    }  # fmt: skip
    found, blind = read_back(acting, shown | {"modalities.sMRI.grid": grid})
    assert {name: found[name] for name in shown} == shown
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


def wrong_start(acting: Acting) -> Acting:
    for modality in acting.model.embedder.by_modality.values():
        torch.nn.init.constant_(modality.projection.weight, 0.1)
    return acting


def wrong_volumes(acting: Acting) -> Acting:
    for group in acting.batches[0].pixel_values.values():
        group.voxels[0] += 1
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
        (lambda acting: replace(acting, fed=acting.batches), "train.augment.shift"),
        (lambda acting: replace(acting, plan=replace(acting.plan, seed=8)), "seed"),
        (lambda acting: replace(acting, batches=acting.batches * 2), "train.accumulate"),
    ],
)
def test_a_value_that_did_not_arrive_is_found(acting: Acting, spoil: Callable[[Acting], Acting], name: str) -> None:
    read_back(acting, {name: SET[name]})
    with pytest.raises(UserError, match=rf"^tune\.space\.{name}: was to be {re.escape(str(SET[name]))} and is "):
        read_back(spoil(acting), {name: SET[name]})


@pytest.mark.parametrize(
    ("spoil", "name", "value"),
    [
        (wrong_start, "model.embedder_init", "random"),
        (wrong_volumes, "modalities.sMRI.intensity", "zscore"),
        (wrong_volumes, "modalities.fMRI.frame_stride", 1),
    ],
)
def test_another_start_of_the_embedder_and_other_volumes_are_found(
    acting: Acting, spoil: Callable[[Acting], Acting], name: str, value: Any
) -> None:
    assert read_back(acting, {name: value}) == ({name: value}, [])
    with pytest.raises(UserError, match=rf"^tune\.space\.{name}: was to be {value} and is "):
        read_back(spoil(acting), {name: value})


def test_an_inflated_embedder_is_told_from_a_random_one_until_it_has_moved(acting: Acting, tmp_path: Path) -> None:
    flat = SiglipVisionEmbeddings(SiglipVisionConfig(hidden_size=16, num_attention_heads=1, image_size=8, patch_size=4))
    inflate(acting.model.embedder, flat)
    inflated = acting.settings.model.model_copy(update={"embedder_init": "inflated"})
    one = replace(acting, settings=acting.settings.model_copy(update={"model": inflated}))
    assert read_back(one, {"model.embedder_init": "inflated"}) == ({"model.embedder_init": "inflated"}, [])
    with pytest.raises(UserError, match=r"embedder_init: was to be random and is inflated where it acts"):
        read_back(one, {"model.embedder_init": "random"})
    one.model.save_pretrained(tmp_path)
    again = inflated.model_copy(update={"checkpoint": str(tmp_path)})
    trained = replace(one, settings=acting.settings.model_copy(update={"model": again}))
    assert read_back(trained, {"model.embedder_init": "inflated"})[1] == ["model.embedder_init"], "it keeps its own"
    one.optimizer.step()
    one.schedule.step()
    assert read_back(one, {"model.embedder_init": "inflated"})[1] == ["model.embedder_init"]


def under(acting: Acting, model: Any = None, **values: Any) -> Acting:
    """The same training under other settings, all of which arrive."""
    settings = acting.settings.with_values({name.replace("__", "."): value for name, value in values.items()})
    model, batch = model or acting.model, acting.batches[0]
    optimizer = build_optimizer(model, settings.optim)
    weights = torch.zeros_like(batch.loss_weights)
    for row, example in zip(weights, acting.examples, strict=True):
        row[: len(example.input_ids)] = torch.from_numpy(loss_weights(example, settings.mask))
    return replace(
        acting,
        settings=settings,
        model=model,
        parts=parts(model),
        optimizer=optimizer,
        schedule=build_schedule(optimizer, settings.optim, 6),
        batches=[replace(batch, loss_weights=weights)],
    )


def test_an_embedder_without_a_rate_of_its_own_has_that_of_the_others(acting: Acting) -> None:
    one = under(acting, optim__embedder_lr=None)
    assert read_back(one, {"optim.embedder_lr": None, "optim.lr": 3e-3})[1] == []
    one.optimizer.param_groups[0].update(initial_lr=1e-5)
    with pytest.raises(UserError, match=r"embedder_lr: was to be None and is 1e-05"):
        read_back(one, {"optim.embedder_lr": None})


@pytest.mark.parametrize(
    ("train", "name", "value"),
    [
        ("embedder", "optim.lr", 3e-3),  # the embedder has a rate of its own
        ("projector", "optim.embedder_lr", 1e-4),
        ("projector", "model.lora_rank", 16),
        ("projector", "mask.task_weights", {"T9": 1.0}),  # no such sample in the batch
        ("projector", "optim.clip", 1.0),
    ],
)
def test_what_acts_on_nothing_that_is_there_is_not_said_to_be_read_and_stops_nobody(
    acting: Acting, build: Callable[..., Any], train: str, name: str, value: Any
) -> None:
    set_too = {"mask__task_weights": value} if isinstance(value, dict) else {}
    one = under(acting, build(train=train), model__train=train, **set_too)
    _, blind = read_back(one, {name: value})
    assert blind == ["mask.task_weights.T9" if set_too else name]
    if not set_too:
        other = value * 2
        with pytest.raises(UserError, match=rf"{name}: was to be {other} and is {value} in the settings"):
            read_back(one, {name: other})


def test_of_a_section_that_is_swept_as_a_whole_each_setting_is_read(acting: Acting) -> None:
    swept = {"mask": {"turn_header": True}, "optim": {"lr": 3e-3, "warmup": 1}, "train.augment": {}}
    found, blind = read_back(acting, swept)
    assert (found, blind) == ({"mask.turn_header": True, "optim.lr": 3e-3, "optim.warmup": 1}, [])


def test_a_value_that_a_preset_overrules_is_found(acting: Acting) -> None:
    one = under(acting, mask__preset="upstream", mask__turn_header=False)
    assert read_back(one, {"mask.preset": "upstream", "mask.turn_header": True})[1] == []
    with pytest.raises(UserError, match=r"mask\.turn_header: was to be False and is another one in the weights"):
        read_back(one, {"mask.preset": "upstream", "mask.turn_header": False})


def test_weights_of_other_tokens_are_found_in_rows_that_share_samples(
    acting: Acting, batch_of: Callable[..., Any]
) -> None:
    one = under(acting, data__pack=4096, mask__turn_header=False)
    packed = batch_of(*NAMES, pack=4096)
    assert len(packed.input_ids) == 1
    read_back(replace(one, batches=[packed]), {"mask.turn_header": False})
    turned = replace(packed, loss_weights=packed.loss_weights.flip(1))
    with pytest.raises(UserError, match=r"mask\.turn_header"):
        read_back(replace(one, batches=[turned]), {"mask.turn_header": False})


def test_another_patch_of_the_embedder_a_part_without_an_optimizer_and_other_draws_are_found(
    acting: Acting, batch_of: Callable[..., Any]
) -> None:
    drawn = replace(acting, batches=[batch_of(*NAMES, draws=[(8, 0, i) for i in range(3)])])
    with pytest.raises(UserError, match=r"seed: was to be 7 and is 8 where it acts"):
        read_back(drawn, {"seed": 7})
    acting.model.embedder.by_modality["sMRI"].patch = (4, 4, 4)
    with pytest.raises(UserError, match=r"sMRI\.patch: was to be \(2, 4, 4\) and is \(4, 4, 4\)"):
        read_back(acting, {"modalities.sMRI.patch": [2, 4, 4]})
    kept = [group for group in acting.optimizer.param_groups if group["name"].startswith("embedder.")]
    acting.optimizer.param_groups[:] = kept
    with pytest.raises(UserError, match=r"model\.train: was to be embedder\+projector and is embedder "):
        read_back(acting, {"model.train": "embedder+projector"})
