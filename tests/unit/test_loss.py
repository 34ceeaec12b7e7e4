"""The loss of a global batch: the same number and gradients however the batch is split, over steps or over workers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tests.unit.workers import run_workers
from umbrella.data.batching import Batch
from umbrella.models.build import build_model
from umbrella.models.settings import ModelSettings
from umbrella.models.trainable_parameters import component_parameters
from umbrella.training.distributed import parallelise
from umbrella.training.settings import TrainSettings
from umbrella.training.step import train_step

Measured = tuple[float, float, dict[str, torch.Tensor]]
"""Loss, supervised tokens, and the gradient by weight."""

NAMES = ("two", "none", "three", "two", "none", "none", "three", "two", "two", "three", "none", "two")


def measure(model: nn.Module, batches: Sequence[Batch]) -> Measured:
    """What a step of rate 0 sees."""
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = torch.optim.SGD([w for w in inner.parameters() if w.requires_grad], lr=0.0)
    seen: dict[str, torch.Tensor] = {}

    def look(*unused: Any) -> None:
        seen.update({name: w.grad.clone() for name, w in inner.named_parameters() if w.grad is not None})

    optimizer.register_step_pre_hook(look)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    result = train_step(model, batches, optimizer, schedule, clip=1e9, parts=component_parameters(inner))
    return result.loss, result.supervised_tokens, seen


def assert_same(one: Measured, other: Measured) -> None:
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert one[1] == pytest.approx(other[1], rel=1e-6)
    assert max(float(gradient.abs().max()) for gradient in other[2].values()) > 1e-4
    torch.testing.assert_close(one[2], other[2], rtol=0, atol=1e-5)


def layouts(names: Sequence[str]) -> Iterator[tuple[int, int, list[list[list[str]]]]]:
    """(workers, accumulated, names of the samples by worker and micro-batch) of every even way to deal out a batch."""
    for workers in (1, 2, 3, 4):
        for accumulated in (1, 2, 3, 4):
            parts = workers * accumulated
            if len(names) % parts == 0:
                dealt = [list(part) for part in zip(*[iter(names)] * (len(names) // parts), strict=True)]
                yield workers, accumulated, [dealt[w::workers] for w in range(workers)]


@pytest.fixture
def weighted(batch_of: Callable[..., Batch]) -> Callable[..., Batch]:
    """A batch whose targets weigh differently, each token the same wherever its sample lies."""

    def make(names: Sequence[str], pack: int = 0) -> Batch:
        batch = batch_of(*names, pack=pack)
        return replace(batch, loss_weights=batch.loss_weights * (1 + batch.input_ids % 7) / 7)

    return make


@pytest.fixture
def whole(build: Callable[..., Any], weighted: Callable[..., Batch]) -> Measured:
    """One batch on one worker: what everything else is compared with."""
    return measure(build(), [weighted(NAMES)])


@pytest.mark.parametrize("pack", [0, 200, 10_000])
def test_every_split_into_micro_batches_packed_or_padded_has_the_same_loss_and_gradients(
    build: Callable[..., Any], weighted: Callable[..., Batch], whole: Measured, pack: int
) -> None:
    model = build()
    for cuts in ([], [1], [5, 6], [2, 3, 9]):  # uneven ones too
        parts = [weighted(NAMES[i:j], pack) for i, j in pairwise((0, *cuts, len(NAMES)))]
        assert (pack < 10_000) or all(len(part.input_ids) == 1 for part in parts)
        assert_same(measure(model, parts), whole)


@pytest.mark.parametrize("pack", [0, 200])
def test_the_order_of_the_samples_does_not_matter(
    build: Callable[..., Any], weighted: Callable[..., Batch], whole: Measured, pack: int
) -> None:
    for order in (NAMES[::-1], sorted(NAMES)):
        assert_same(measure(build(), [weighted(order, pack)]), whole)


def test_a_slice_of_a_packed_batch_has_the_loss_of_its_samples(
    build: Callable[..., Any], weighted: Callable[..., Batch]
) -> None:
    packed = weighted(NAMES, 200)
    assert len(packed.input_ids) < len(packed) == len(NAMES)
    assert_same(measure(build(), [packed[2:5], packed[0]]), measure(build(), [weighted((*NAMES[2:5], NAMES[0]))]))


def test_the_loss_is_the_cross_entropy_of_the_labels(build: Callable[..., Any], batch_of: Callable[..., Batch]) -> None:
    model, batch = build(), batch_of("two", "none", "three", "two")
    logits = model(batch.input_ids, batch.attention_mask, batch.pixel_values).logits
    plain = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())  # -100 is left out
    names, weights = zip(*((n, w) for n, w in model.named_parameters() if w.requires_grad), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(plain, weights), strict=True))
    # "male." twice, "Hello, you.", "Seen." and "63.5", each with its two tokens of an end.
    assert_same(measure(model, [batch]), (plain.item(), 2 * 7 + 13 + 7 + 6, gradients))


def work(rank: int, folder: Path, made_of: tuple, cases: dict[str, list[list[Batch]]]) -> None:
    torch.set_num_threads(1)
    measured = {}
    for workers in (2, 3, 4):
        mine = {name: batches[rank] for name, batches in cases.items() if len(batches) == workers and rank < workers}
        if not mine:
            continue
        address = f"file://{folder / f'meeting of {workers}'}"
        # A worker that lacks a gradient leaves the others waiting.
        distributed.init_process_group("gloo", address, timeout=timedelta(minutes=10), rank=rank, world_size=workers)
        torch.manual_seed(0)
        parallel = parallelise(build_model(*made_of).train(), TrainSettings(), torch.device("cpu"), workers)
        measured |= {name: measure(parallel, batches) for name, batches in mine.items()}
        distributed.destroy_process_group()
    torch.save(measured, folder / f"{rank}.pt")


def test_two_to_four_workers_have_the_loss_and_gradients_of_one(
    build: Callable[..., Any], weighted: Callable[..., Batch], whole: Measured, tokenizer: Any, tmp_path: Path
) -> None:
    model = build()
    made_of = (ModelSettings(width=16, heads=2), model.config.modalities, len(tokenizer), model.config.image_token_id)
    cases = {
        f"{workers} workers, {accumulated} accumulated, packed to {pack}": [
            [weighted(names, pack) for names in micro] for micro in dealt
        ]
        for workers, accumulated, dealt in layouts(NAMES)
        for pack in (0, 200)
        if workers > 1
    }
    assert len(cases) == 2 * (3 + 3 + 2)  # 2 workers with 1 to 3, 3 with 1, 2 and 4, 4 with 1 and 3
    lopsided = [[weighted(["two"])], [weighted(["none"])]]
    assert [set(batches[0].pixel_values) for batches in lopsided] == [{"fMRI", "sMRI"}, set()]
    run_workers(work, (tmp_path, made_of, cases | {"volumes only on the first worker": lopsided}), 4)
    expected = dict.fromkeys(cases, whole)
    expected["volumes only on the first worker"] = measure(model, [weighted(["two", "none"])])
    seen = set()
    for rank in range(4):
        measured = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        seen |= set(measured)
        for name, one in measured.items():
            assert_same(one, expected[name])
    assert seen == set(expected)
