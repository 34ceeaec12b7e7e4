"""The loss of a global batch: the same number and gradients however the batch is split, over steps or over workers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from umbrella.data.batching import Batch
from umbrella.model.presets import build_model, parts
from umbrella.model.settings import ModelSettings
from umbrella.training.step import train_step

Measured = tuple[float, float, dict[str, torch.Tensor]]
"""Loss, supervised tokens, and the gradient by weight."""

NAMES = ("two", "none", "three", "two")


def measure(model: nn.Module, batches: Sequence[Batch]) -> Measured:
    """What a step of rate 0 sees."""
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = torch.optim.SGD([w for w in inner.parameters() if w.requires_grad], lr=0.0)
    seen: dict[str, torch.Tensor] = {}

    def look(*unused: Any) -> None:
        seen.update({name: w.grad.clone() for name, w in inner.named_parameters() if w.grad is not None})

    optimizer.register_step_pre_hook(look)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    result = train_step(model, batches, optimizer, schedule, clip=1e9, parts=parts(inner))
    return result.loss, result.supervised_tokens, seen


def assert_same(one: Measured, other: Measured) -> None:
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert one[1] == pytest.approx(other[1], rel=1e-6)
    assert max(float(gradient.abs().max()) for gradient in other[2].values()) > 1e-4
    torch.testing.assert_close(one[2], other[2], rtol=0, atol=1e-5)


@pytest.fixture
def weighted(batch_of: Callable[..., Batch]) -> Batch:
    """Four rows whose targets weigh differently; the second has none."""
    batch = batch_of(*NAMES)
    weights = batch.loss_weights * torch.rand(batch.loss_weights.shape, generator=torch.Generator().manual_seed(0))
    weights[1] = 0
    return replace(batch, loss_weights=weights)


def test_every_split_into_micro_batches_has_the_same_loss_and_gradients(
    build: Callable[..., Any], weighted: Batch
) -> None:
    model = build()
    whole = measure(model, [weighted])
    for cuts in (cut for count in (1, 2, 3) for cut in combinations(range(1, 4), count)):
        assert_same(measure(model, [weighted[i:j] for i, j in pairwise((0, *cuts, 4))]), whole)


def test_the_loss_is_the_cross_entropy_of_the_labels(build: Callable[..., Any], batch_of: Callable[..., Batch]) -> None:
    model, batch = build(), batch_of(*NAMES)
    logits = model(batch.input_ids, batch.attention_mask, batch.pixel_values).logits
    plain = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())  # -100 is left out
    names, weights = zip(*((n, w) for n, w in model.named_parameters() if w.requires_grad), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(plain, weights), strict=True))
    # "male." twice, "Hello, you.", "Seen." and "63.5", each with its two tokens of an end.
    assert_same(measure(model, [batch]), (plain.item(), 2 * 7 + 13 + 7 + 6, gradients))


def work(rank: int, folder: Path, made_of: tuple, cases: dict[str, list[list[Batch]]]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    address = f"file://{folder / 'meeting'}"
    # A worker that lacks a gradient leaves the other waiting.
    distributed.init_process_group("gloo", address, timeout=timedelta(minutes=2), rank=rank, world_size=2)
    parallel = DistributedDataParallel(build_model(*made_of).train())
    measured = {name: measure(parallel, batches[rank]) for name, batches in cases.items()}
    torch.save(measured, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_workers_have_the_loss_and_gradients_of_one(
    build: Callable[..., Any], batch_of: Callable[..., Batch], weighted: Batch, tokenizer: Any, tmp_path: Path
) -> None:
    model = build(seed=0)
    made_of = (ModelSettings(width=16, heads=2), model.config.modalities, len(tokenizer), model.config.image_token_id)
    lopsided = batch_of("two", "none")
    assert set(lopsided[0].pixel_values) == {"fMRI", "sMRI"}
    cases = {  # each worker's micro-batches
        "accumulated": [[weighted[0:1], weighted[1:2]], [weighted[2:3], weighted[3:4]]],
        "volumes only on the first worker": [[lopsided[0:1]], [lopsided[1:2]]],
    }
    multiprocessing.spawn(work, (tmp_path, made_of, cases), nprocs=2)
    for rank in range(2):
        measured = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_same(measured["accumulated"], measure(model, [weighted]))
        assert_same(measured["volumes only on the first worker"], measure(model, [lopsided]))
