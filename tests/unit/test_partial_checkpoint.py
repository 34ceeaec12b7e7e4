"""LoRA adapters and partial checkpoints: with its base, a partial checkpoint is the full model."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.conftest import nll
from umbrella.base import UserError
from umbrella.data.batching import Batch
from umbrella.models.build import component_parameters, merge_adapters
from umbrella.models.umbrella_llava import UmbrellaForConditionalGeneration as Umbrella
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.settings import OptimSettings

OPTIM = OptimSettings(lr=1e-2)
LORA = {"train": "embedder+lora", "lora_rank": 2}
Build = Callable[..., Any]
Train = Callable[..., tuple[Any, Path]]


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.fixture
def batch(batch_of: Callable[..., Batch]) -> Batch:
    return batch_of("two", "none", "three")


@pytest.fixture
def base(save_llava: Any, tmp_path: Path) -> str:
    save_llava(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def adapted(build: Build) -> Any:
    """A model with adapters that change its output."""
    model = build(**LORA)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture
def train(build: Build, save_step: Callable[..., Path], tmp_path: Path) -> Train:
    """Builds a model, changes its trainable weights, and writes a checkpoint: the model and the checkpoint."""

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


def test_new_adapters_are_on_every_matrix_of_the_language_model_and_change_nothing(build: Build, batch: Batch) -> None:
    plain, model = build(), build(**LORA)
    torch.testing.assert_close(nll(model, batch), nll(plain, batch), rtol=0, atol=1e-6)
    adapters = {name: weight for name, weight in model.named_parameters() if "lora_A" in name}
    assert all(name.startswith("model.language_model.layers.") for name in adapters)
    assert len(adapters) == 2 * 7  # two layers of four matrices of attention and three of the network
    assert {len(weight) for weight in adapters.values()} == {2}


def test_saved_model_with_adapters_is_loaded_by_us_and_by_peft(build: Build, train: Train, batch: Batch) -> None:
    adapted, step = train("run", **LORA)
    assert set(load_file(step / "model.safetensors")) == set(build().state_dict()) - {"lm_head.weight"}  # tied
    again = Umbrella.from_pretrained(step)
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in adapted.state_dict().items())
    same(nll(again, batch), nll(adapted, batch))
    continued = build(**LORA, checkpoint=str(step))
    same(nll(continued, batch), nll(adapted, batch))
    assert all(w.requires_grad for w in component_parameters(continued)["lora"])
    assert not any(w.requires_grad for w in component_parameters(continued)["language_model"])
    with pytest.raises(UserError, match="has adapters already, made with r=2, lora_alpha=32, lora_dropout=0; set"):
        build(checkpoint=str(step), train="lora", lora_rank=8)

    (step / "adapter").rename(step / "moved")
    plain = Umbrella.from_pretrained(step)
    assert not torch.allclose(nll(plain, batch), nll(adapted, batch), atol=1e-4)
    same(nll(PeftModel.from_pretrained(plain, str(step / "moved")), batch), nll(adapted, batch))


def test_adapters_in_a_folder_are_required_if_configured_and_deleted_by_a_model_without(
    build: Build, train: Train, batch: Batch
) -> None:
    _, step = train("run", **LORA)
    (step / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        Umbrella.from_pretrained(step)
    plain = build()
    plain.save_pretrained(step)
    assert torch.equal(nll(Umbrella.from_pretrained(step), batch), nll(plain, batch))


def test_merged_adapters_change_nothing_and_can_be_saved(
    build: Build, adapted: Any, batch: Batch, tmp_path: Path
) -> None:
    expected = nll(adapted, batch)
    with pytest.raises(ValueError, match=r"the model has adapters; merge them with "):
        adapted.save_pretrained(tmp_path)
    merge_adapters(adapted)
    same(nll(adapted, batch), expected)
    adapted.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(build().state_dict()) - {"lm_head.weight"}
    same(nll(Umbrella.from_pretrained(tmp_path), batch), expected)


@pytest.mark.parametrize("options", [{"train": "embedder+tower"}, LORA], ids=str)
def test_partial_checkpoint_with_its_base_is_the_full_model(
    build: Build, train: Train, base: str, batch: Batch, tmp_path: Path, options: dict
) -> None:
    model, step = train("run", checkpoint=base, **options)
    again = build(**options, checkpoint=str(step))
    same(nll(again, batch), nll(model, batch))
    assert [
        name for name, weight in model.named_parameters() if not torch.equal(again.get_parameter(name), weight)
    ] == []
    with pytest.raises(ValueError, match=r"run/step_0000001 is a partial checkpoint.*from_checkpoint loads"):
        Umbrella.from_pretrained(step)
    merge_adapters(again)
    again.save_pretrained(tmp_path / "alone")
    same(nll(Umbrella.from_pretrained(tmp_path / "alone"), batch), nll(model, batch))
    if options == LORA:
        (step / "adapter").rename(step / "moved")
        same(nll(PeftModel.from_pretrained(build(checkpoint=str(step)), str(step / "moved")), batch), nll(model, batch))


def test_second_stage_refers_to_the_first_base_and_does_not_need_the_first_stage(
    build: Build, train: Train, base: str, batch: Batch, tmp_path: Path
) -> None:
    first, step = train("one", checkpoint=base, train="embedder+projector+lora", lora_rank=2)
    second, later = train("two", checkpoint=str(step), train="embedder")
    assert json.loads((later / "base.json").read_text())["checkpoint"] == base
    step.rename(tmp_path / "gone")
    third = build(checkpoint=str(later), train="embedder+projector")
    same(nll(third, batch), nll(second, batch))
    for name, weight in first.named_parameters():
        assert ".by_modality." in name or torch.equal(third.get_parameter(name), weight), name


def test_full_checkpoint_may_be_a_base_and_training_all_weights_needs_none(
    build: Build, train: Train, batch: Batch
) -> None:
    _, full = train("one")
    assert not (full / "base.json").exists()
    model, step = train("two", checkpoint=str(full), **LORA)
    assert json.loads((step / "base.json").read_text())["checkpoint"] == str(full)
    same(nll(build(checkpoint=str(step)), batch), nll(model, batch))
    everything, last = train("three", checkpoint=str(step), train="all")
    assert not (last / "base.json").exists()
    same(nll(Umbrella.from_pretrained(last), batch), nll(everything, batch))


def test_trained_weights_are_float32_over_a_base_in_half_precision(
    build: Build, train: Train, save_llava: Any, tmp_path: Path
) -> None:
    save_llava(tmp_path / "half").half().save_pretrained(tmp_path / "half")
    options = {"checkpoint": str(tmp_path / "half"), "train": "projector", "dtype": "bfloat16"}
    model, step = train("run", **options)
    again = build(**options | {"checkpoint": str(step)})
    for name, weight in model.named_parameters():
        assert torch.equal(again.get_parameter(name), weight), name
        assert again.get_parameter(name).dtype == weight.dtype, name


def test_missing_or_changed_base_is_an_error(build: Build, train: Train, base: str, tmp_path: Path) -> None:
    _, step = train("run", checkpoint=base, train="projector")
    weights = load_file(f"{base}/model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, f"{base}/model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"^.*step_0000001: is a partial checkpoint of .*base, and model\.safetensors there has changed"
    ):
        build(checkpoint=str(step))
    Path(base).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"model\.safetensors there is gone; put it back \(a link will do\)$"):
        build(checkpoint=str(step))
    save_file(weights, tmp_path / "elsewhere" / "model.safetensors", {"format": "pt"})
    Path(base).symlink_to(tmp_path / "elsewhere")
    assert build(checkpoint=str(step)) is not None
