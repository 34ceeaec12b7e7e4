"""GPU memory of a training, counted without a GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.unit.steps import Make
from umbrella.config import load_settings
from umbrella.data.batching import Batch
from umbrella.models.build import component_parameters
from umbrella.models.varlen import find_sequences
from umbrella.training.estimate import count_memory

NAMES = ("two", "none", "three", "two")


@pytest.fixture
def count(build: Make) -> Make:
    def count(batch: Batch, **given: Any) -> tuple[int, int, int]:
        settings = load_settings(overrides={name.replace("__", "."): value for name, value in given.items()})
        with torch.device("meta"):
            model = build(train=settings.model.train, dtype=settings.model.dtype)
        return count_memory(model, batch, settings)

    return count


@pytest.mark.parametrize("train", ["embedder", "projector+lora", "all"])
def test_as_many_bytes_are_counted_as_a_real_step_saves(build: Make, batch_of: Make, count: Make, train: str) -> None:
    batch, model = batch_of(*NAMES), build(train=train)
    weights = {weight.untyped_storage() for weight in model.parameters()}
    saved: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor), lambda index: None):
        model(**batch.model_inputs())
    sizes = [storage.nbytes() for storage in {tensor.untyped_storage() for tensor in saved} - weights]
    voxels = sum(group.voxels.nbytes for group in batch.pixel_values.values())
    logits = 4 * len(model.lm_head.weight) * int((batch.loss_weights[:, 1:] != 0).sum())
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    expected = sum(sizes) + max(2 * logits, 3 * max(sizes)) + 2 * voxels
    counted = count(batch, model__train=train)
    assert counted[:2] == (sum(weight.nbytes for weight in model.parameters()), 2 * trained)
    assert counted[2] == pytest.approx(expected, rel=0.03)


def test_compilation_checkpoints_and_shards_save_memory_and_kept_gradients_cost_it(batch_of: Make, count: Make) -> None:
    batch, given = batch_of(*NAMES), {"model__train": "all", "model__dtype": "bfloat16"}
    weights, optimizer, eager = count(batch, **given)
    compiled = count(batch, **given, train__compile=True)[2]
    checkpointed = count(batch, **given, train__checkpoint_activations=True)[2]
    assert checkpointed < compiled < 0.9 * eager
    assert eager < count(batch, **given | {"model__dtype": "float32"})[2]
    assert count(batch, **given, train__accumulate=2)[2] == eager + optimizer // 2, "the gradients of the first batch"
    sharded = count(batch, **given, train__shard=True, resources__workers=4)
    assert sharded == (weights // 4 + weights, optimizer // 4, eager), "the two layers that are gathered are all"


def test_copied_keys_of_shared_prefixes_are_counted(
    batch_of: Make, build: Make, save_llava: Make, tmp_path: Path
) -> None:
    save_llava(tmp_path)
    options = {"checkpoint": str(tmp_path), "dtype": "bfloat16", "attention": "varlen"}
    settings = load_settings(overrides={f"model.{name}": value for name, value in options.items()})
    shared = batch_of(*["three"] * 6, pack=1000, pack_prefixes=True)
    counted = []
    for batch in (shared, replace(shared, places=None)):
        with torch.device("meta"):
            model = build(**options)
        counted.append(count_memory(model, batch, settings)[2])
    keys, *places = find_sequences(shared.attention_mask, shared.prefix)[4:]
    layers, heads, width, byte = 2, 2, 8, 2  # the repeated heads of keys and values
    more = layers * 2 * heads * width * byte * (len(keys) - shared.input_ids.numel())
    assert counted[0] - counted[1] == pytest.approx(more + sum(place.nbytes for place in places), rel=0.02)


@pytest.mark.parametrize("init", ["random", "inflated"])
def test_on_the_meta_device_a_checkpoint_without_weights_has_the_parameters_of_the_loaded_model(
    build: Make, save_llava: Make, tmp_path: Path, init: str
) -> None:
    save_llava(tmp_path, "clip", "llama", tie_word_embeddings=False)
    options = {"checkpoint": str(tmp_path), "train": "embedder+lora", "dtype": "bfloat16", "embedder_init": init}
    if init == "random":
        build(checkpoint=str(tmp_path)).save_pretrained(tmp_path)
    loaded = build(**options)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with torch.device("meta"):
        counted = build(**options)
    assert {weight.device.type for weight in counted.parameters()} == {"meta"}
    described = [
        [(name, w.shape, w.dtype, w.requires_grad) for name, ws in component_parameters(model).items() for w in ws]
        for model in (counted, loaded)
    ]
    assert described[0] == described[1]
