"""The loss of a global batch: the same number and gradients however the batch is split, over steps or over workers."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn import functional

from tests.unit.steps import CPU, Make, join_group, measure, run_workers
from umbrella.data.batching import Batch
from umbrella.training.distributed import parallelise

NAMES = ("two", "none", "three", "two", "none", "none", "three", "two", "two", "three", "none", "two")


def assert_same(one: Any, other: Any) -> None:
    assert one[0]["train/loss"] == pytest.approx(other[0]["train/loss"], abs=1e-5)
    assert one[0]["train/supervised_tokens"] == other[0]["train/supervised_tokens"]
    assert max(float(gradient.abs().max()) for gradient in other[1].values()) > 1e-4
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-5)


@pytest.fixture
def weighted(batch_of: Make) -> Make:
    """A batch whose targets weigh differently, each token the same wherever its sample lies."""

    def make(names: Sequence[str], pack: int = 0) -> Batch:
        batch = batch_of(*names, pack=pack)
        return replace(batch, loss_weights=batch.loss_weights * (1 + batch.input_ids % 7) / 7)

    return make


@pytest.mark.parametrize("pack", [0, 200, 10_000])
def test_every_order_and_split_packed_or_padded_has_the_same_loss_and_gradients(
    build: Make, weighted: Make, pack: int
) -> None:
    model = build()
    expected = measure(model, weighted(NAMES))
    splits = [(NAMES, []), (NAMES, [1]), (NAMES, [2, 3, 9]), (NAMES[::-1], [5, 6]), (sorted(NAMES), [])]
    for names, cuts in splits:
        parts = [weighted(names[i:j], pack) for i, j in pairwise((0, *cuts, len(NAMES)))]
        assert (pack < 10_000) or all(len(part.input_ids) == 1 for part in parts)
        assert_same(measure(model, *parts), expected)
    batch = weighted(NAMES, pack)
    assert_same(measure(model, batch[2:5], batch[0], batch[1], batch[5:]), expected)


def test_the_loss_is_the_cross_entropy_of_the_labels(build: Make, batch_of: Make) -> None:
    model, batch = build(), batch_of("two", "none", "three", "two")
    logits = model(batch.input_ids, batch.attention_mask, batch.pixel_values).logits
    plain = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())  # -100 is left out
    names, weights = zip(*((n, w) for n, w in model.named_parameters() if w.requires_grad), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(plain, weights), strict=True))
    # "male." twice, "Hello, you.", "Seen." and "63.5", each with its two tokens of an end.
    metrics = {"train/loss": plain.item(), "train/supervised_tokens": 2 * 7 + 13 + 7 + 6}
    assert_same(measure(model, batch), (metrics, gradients))


def work(rank: int, folder: Path, model: Any, cases: dict[str, list[list[Batch]]], expected: dict[str, Any]) -> None:
    for workers in (2, 3, 4):
        if rank >= workers:
            continue
        join_group(rank, workers, folder)
        parallel = parallelise(model, CPU, workers)
        for name, batches in cases.items():
            if len(batches) == workers:
                assert_same(measure(parallel, *batches[rank]), expected[name])
        distributed.destroy_process_group()


def test_two_to_four_workers_have_the_loss_and_gradients_of_one(build: Make, weighted: Make, tmp_path: Path) -> None:
    cases = {}
    for workers, accumulated in ((2, 1), (2, 3), (3, 2), (3, 4), (4, 1), (4, 3)):
        for pack in (0, 200):
            dealt = [weighted(part, pack) for part in zip(*[iter(NAMES)] * (12 // workers // accumulated), strict=True)]
            cases[f"{workers} workers, {accumulated} accumulated, {pack}"] = [dealt[w::workers] for w in range(workers)]
    expected = dict.fromkeys(cases, measure(build(), weighted(NAMES)))
    one_sided = [[weighted(["two"])], [weighted(["none"])]]
    assert [set(batches[0].pixel_values) for batches in one_sided] == [{"fMRI", "sMRI"}, set()]
    expected["volumes only on the first worker"] = measure(build(), weighted(["two", "none"]))
    run_workers(work, (tmp_path, build(), cases | {"volumes only on the first worker": one_sided}, expected), 4)
