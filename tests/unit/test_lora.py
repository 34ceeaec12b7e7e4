"""Adapters on the language model: they start at nothing, move alone, and are saved as PEFT saves them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from umbrella.base import UserError
from umbrella.data.batching import Batch
from umbrella.models.build import build_model
from umbrella.models.settings import ModelSettings
from umbrella.models.trainable_parameters import component_parameters
from umbrella.models.umbrella_llava import UmbrellaForConditionalGeneration as Umbrella
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.settings import OptimSettings
from umbrella.training.step import train_step


def nll(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch.model_inputs()).token_nll


@pytest.fixture
def batch(batch_of: Callable[..., Batch]) -> Batch:
    return batch_of("two", "none", "three")


@pytest.fixture
def trained(build: Callable[..., Any], batch: Batch) -> Any:
    """Three steps with the embedder and adapters moving."""
    model = build(train="embedder+lora", lora_rank=2)
    settings = OptimSettings(lr=1e-2, warmup=0)
    optimizer = build_optimizer(model, settings)
    schedule = build_schedule(optimizer, settings, 3)
    for _ in range(3):
        result = train_step(model, [batch], optimizer, schedule, settings.clip, component_parameters(model))
    assert {"train/grad_norm/embedder", "train/grad_norm/lora"} < set(result)
    return model


def test_adapters_start_at_nothing_and_sit_on_every_matrix_of_the_language_model(
    build: Callable[..., Any], batch: Batch
) -> None:
    plain, adapted = build(), build(train="embedder+lora", lora_rank=2)
    torch.testing.assert_close(nll(adapted, batch), nll(plain, batch), rtol=0, atol=1e-6)
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert len(names) == 2 * 7  # two layers of four matrices of attention and three of the network
    assert {len(w) for n, w in adapted.named_parameters() if "lora_A" in n} == {2}


def test_a_saved_model_with_adapters_gives_the_same_outputs(trained: Any, batch: Batch, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    again = Umbrella.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in trained.state_dict().items())
    # To the last bit only where the weights lie alike in memory.
    torch.testing.assert_close(nll(again, batch), nll(trained, batch), rtol=0, atol=1e-5)
    settings = ModelSettings(checkpoint=str(tmp_path), train="embedder+lora", lora_rank=2)
    continued = build_model(settings, trained.config.modalities, 260, trained.config.image_token_id)
    torch.testing.assert_close(nll(continued, batch), nll(trained, batch), rtol=0, atol=1e-5)
    assert all(w.requires_grad for w in component_parameters(continued)["lora"])
    assert not any(w.requires_grad for w in component_parameters(continued)["language_model"])


def test_adapters_are_saved_as_peft_saves_them_and_the_rest_without_them(
    build: Callable[..., Any], trained: Any, batch: Batch, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(build().state_dict()) - {"lm_head.weight"}  # tied
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    with_adapters = nll(trained, batch)
    (tmp_path / "adapter").rename(tmp_path / "moved")
    base = Umbrella.from_pretrained(tmp_path)
    assert not torch.allclose(nll(base, batch), with_adapters, atol=1e-4)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "moved"))
    torch.testing.assert_close(nll(adapted, batch), with_adapters, rtol=0, atol=1e-5)


def test_adapters_of_a_checkpoint_are_not_taken_for_others(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    settings = ModelSettings(checkpoint=str(tmp_path), train="lora", lora_rank=8)
    with pytest.raises(UserError, match="has adapters already, made with r=2, lora_alpha=32, lora_dropout=0; set"):
        build_model(settings, trained.config.modalities, 260, trained.config.image_token_id)


def test_adapters_are_neither_left_behind_nor_cut_in_pieces(
    build: Callable[..., Any], trained: Any, batch: Batch, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(nll(Umbrella.from_pretrained(tmp_path), batch), nll(trained, batch), rtol=0, atol=1e-5)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        Umbrella.from_pretrained(tmp_path)
    plain = build()
    plain.save_pretrained(tmp_path)
    assert torch.equal(nll(Umbrella.from_pretrained(tmp_path), batch), nll(plain, batch))
