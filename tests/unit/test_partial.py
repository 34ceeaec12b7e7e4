"""A checkpoint of what was trained: with its base it is the whole model, for the next training and other readers."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.unit.test_lora import nll
from umbrella.base import UserError
from umbrella.data.batching import Batch
from umbrella.models.build import load_trained
from umbrella.models.umbrella_llava import UmbrellaForConditionalGeneration as Umbrella
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.settings import OptimSettings

OPTIM = OptimSettings(lr=1e-2)


@pytest.fixture
def batch(batch_of: Callable[..., Batch]) -> Batch:
    return batch_of("two", "none", "three")


@pytest.fixture
def base(save_llava: Any, tmp_path: Path) -> str:
    save_llava(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def trained(build: Callable[..., Any], save_step: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """Builds a model, changes what moves of it, and writes a checkpoint: the model and the checkpoint."""

    def train(name: str, **options: Any) -> tuple[Any, Path]:
        model = build(**options)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight), alpha=0.05)
        optimizer = build_optimizer(model, OPTIM)
        training = SimpleNamespace(model=model, optimizer=optimizer, schedule=build_schedule(optimizer, OPTIM, 9))
        return model, save_step(tmp_path / name, training, 1, **{f"model.{k}": v for k, v in options.items()})

    return train


LORA = {"train": "embedder+lora", "lora_rank": 2}


@pytest.mark.parametrize("options", [{"train": "projector"}, {"train": "embedder+tower"}, LORA])
def test_base_and_trained_weights_are_the_model_and_can_be_saved_as_one(
    build: Callable[..., Any], trained: Callable[..., Any], base: str, batch: Batch, tmp_path: Path, options: Any
) -> None:
    model, step = trained("run", checkpoint=base, **options)
    expected = nll(model, batch)
    again = build(**{**options, "checkpoint": str(step)})
    torch.testing.assert_close(nll(again, batch), expected, rtol=0, atol=1e-5)
    for name, weight in model.named_parameters():
        assert torch.equal(again.get_parameter(name), weight), name
    with pytest.raises(ValueError, match=r"run/step_0000001 is a partial checkpoint.*build\.load_trained loads"):
        Umbrella.from_pretrained(step)
    load_trained(step).save_pretrained(tmp_path / "alone")
    alone = Umbrella.from_pretrained(tmp_path / "alone")
    torch.testing.assert_close(nll(alone, batch), expected, rtol=0, atol=1e-5)


def test_adapters_of_a_checkpoint_are_read_by_peft(
    build: Callable[..., Any], trained: Callable[..., Any], base: str, batch: Batch
) -> None:
    model, step = trained("run", checkpoint=base, **LORA)
    (step / "adapter").rename(step / "moved")
    adapted = PeftModel.from_pretrained(load_trained(step), str(step / "moved"))
    torch.testing.assert_close(nll(adapted, batch), nll(model, batch), rtol=0, atol=1e-5)


def test_a_second_stage_stands_on_the_first_ones_base_and_needs_the_first_one_no_more(
    build: Callable[..., Any], trained: Callable[..., Any], base: str, batch: Batch, tmp_path: Path
) -> None:
    first, step = trained("one", checkpoint=base, train="embedder+projector+lora", lora_rank=2)
    second, later = trained("two", checkpoint=str(step), train="embedder")
    assert json.loads((later / "base.json").read_text())["checkpoint"] == base
    step.rename(tmp_path / "gone")
    third = build(checkpoint=str(later), train="embedder+projector")
    torch.testing.assert_close(nll(third, batch), nll(second, batch), rtol=0, atol=1e-5)
    for name, weight in first.named_parameters():
        if ".by_modality." not in name:
            assert torch.equal(third.get_parameter(name), weight), name


@pytest.mark.parametrize("options", [{"train": "embedder"}, LORA])
def test_a_training_from_a_whole_checkpoint_of_ours_stands_on_it(
    build: Callable[..., Any], trained: Callable[..., Any], batch: Batch, options: Any
) -> None:
    _, whole = trained("one")
    assert not (whole / "base.json").exists()
    assert Umbrella.from_pretrained(whole) is not None
    model, step = trained("two", checkpoint=str(whole), **options)
    assert json.loads((step / "base.json").read_text())["checkpoint"] == str(whole)
    torch.testing.assert_close(nll(load_trained(step), batch), nll(model, batch), rtol=0, atol=1e-5)
    everything, full = trained("three", checkpoint=str(step), train="all")
    assert not (full / "base.json").exists()
    torch.testing.assert_close(nll(Umbrella.from_pretrained(full), batch), nll(everything, batch), rtol=0, atol=1e-5)


def test_what_was_trained_keeps_every_digit_over_a_base_in_half_precision(
    build: Callable[..., Any], trained: Callable[..., Any], save_llava: Any, tmp_path: Path
) -> None:
    save_llava(tmp_path / "half").half().save_pretrained(tmp_path / "half")
    options = {"checkpoint": str(tmp_path / "half"), "train": "projector", "dtype": "bfloat16"}
    model, step = trained("run", **options)
    again = build(**options | {"checkpoint": str(step)})
    for name, weight in model.named_parameters():
        assert torch.equal(again.get_parameter(name), weight), name
        assert again.get_parameter(name).dtype == weight.dtype, name


def test_a_base_that_is_gone_or_another_one_is_named(
    build: Callable[..., Any], trained: Callable[..., Any], base: str, tmp_path: Path
) -> None:
    _, step = trained("run", checkpoint=base, train="projector")
    weights = load_file(f"{base}/model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, f"{base}/model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"^.*step_0000001: is a partial checkpoint of .*base, and model\.safetensors there has changed"
    ):
        build(checkpoint=str(step))
    Path(base).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"model\.safetensors there is gone; put it back \(a link will do\)$"):
        load_trained(step)
    save_file(weights, tmp_path / "elsewhere" / "model.safetensors", {"format": "pt"})
    Path(base).symlink_to(tmp_path / "elsewhere")
    assert load_trained(step) is not None
