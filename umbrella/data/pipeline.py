"""Order of samples, their distribution over workers, and iteration over batches with Ray Data.

A row has two numbers: ``position``, the index in the whole training, and ``sample``, an index into the table of
conversations. The table is one Arrow column of JSON in Ray's object store, shared by the workers of a node. Volumes are
read when batches are made.

Rows are generated in chunks, so memory does not grow with the length of the training.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
import pyarrow as pa

from umbrella.conversations.schema import Conversation

ROWS_PER_BLOCK, ROWS_PER_CHUNK = 1024, 32768
Rows = Mapping[str, np.ndarray]
"""``position`` and ``sample``, each (rows,)."""


def sample_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the permutation of ``size`` samples in an epoch; it depends only on (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(size)


@dataclass(frozen=True)
class Plan:
    """Assignment of samples to steps and workers. A step may contain samples of two epochs.

    Position p is sample ``order(p // size)[p % size]``. A step takes the next ``workers * batch_size * accumulate``
    positions. No sample is dropped: the last step is completed by ``surplus`` positions of a further epoch.
    """

    size: int
    seed: int
    epochs: int
    workers: int
    batch_size: int
    accumulate: int
    lengths: np.ndarray | None = field(default=None, compare=False)
    """(size,): length of each sample. Samples of similar length are grouped into a step; None disables grouping."""
    groups: np.ndarray | None = field(default=None, compare=False)
    """(size,): number of the group of each sample, see ``group_samples``. Groups are kept together; None: no groups."""
    window: int = 16
    """Number of steps whose samples are sorted by length together."""
    sorted_by: int = 0
    """Samples per step for sorting; 0 means ``per_step``. A training that is resumed with another number of workers
    keeps the first value, because the order of samples depends on it."""

    @property
    def per_step(self) -> int:
        """Number of samples in a global batch."""
        return self.workers * self.batch_size * self.accumulate

    @property
    def steps(self) -> int:
        """Total number of optimizer steps."""
        return self.steps_from(0)

    def steps_from(self, start: int) -> int:
        """Return the number of optimizer steps from a position to the end."""
        return max(0, ceil((self.epochs * self.size - start) / self.per_step))

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps of an epoch, rounded up."""
        return ceil(self.size / self.per_step)

    @property
    def surplus(self) -> int:
        """Number of samples of the last step that lie beyond the last epoch."""
        return self.steps * self.per_step - self.epochs * self.size

    @property
    def description(self) -> str:
        """One line with the numbers of samples, epochs and steps."""
        line = f"samples: {self.size} in each of {self.epochs} epochs, {self.steps} steps of {self.per_step}"
        return line + (f"; the last step is filled up with {self.surplus} samples once more" if self.surplus else "")

    def positions(self, rank: int, start: int = 0, steps: int | None = None) -> np.ndarray:
        """Return the positions of one worker, in order, for ``steps`` steps from ``start``, or to the end if None."""
        steps = self.steps_from(start) if steps is None else steps
        positions = np.arange(start, start + steps * self.per_step)
        return positions.reshape(-1, self.workers, self.batch_size)[:, rank].reshape(-1)

    def rows(self, rank: int, start: int) -> Iterator[Rows]:
        """Yield the rows of one worker from a position to the end, in order, in chunks of whole steps.

        Each worker generates its own rows. Ray's ``split`` drops up to ``workers - 1`` rows and assigns blocks in the
        order of requests, so it is not reproducible.
        """
        steps = max(1, ROWS_PER_CHUNK // (self.batch_size * self.accumulate))
        order = lru_cache(maxsize=1)(self.order)  # a large epoch has many chunks
        for first in range(0, self.steps_from(start), steps):
            position = start + first * self.per_step
            positions = self.positions(rank, position, min(steps, self.steps_from(position)))
            yield {"position": positions, "sample": self.samples(positions, order)}

    def rng_keys(self, rows: Rows) -> list[tuple[int, int, int]]:
        """Return (seed, epoch, sample) of each row, the seed of its random choices."""
        epochs = rows["position"] // self.size
        return [(self.seed, int(epoch), int(sample)) for epoch, sample in zip(epochs, rows["sample"], strict=True)]

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of samples in an epoch: ``sample_order``, with each window sorted by length if it is known.

        With groups, the window is the epoch, and the samples of a group are together, in a random order of the groups.
        The steps of a window are shuffled. A step that contains two epochs is not sorted.
        """
        order = sample_order(self.seed, epoch, self.size)
        rng = np.random.default_rng((self.seed, epoch, 1))
        keys, window = self.lengths, self.window
        if self.groups is not None:
            keys, window = rng.permutation(self.groups.max() + 1)[self.groups], self.size
        if keys is None:
            return order
        step = self.sorted_by or self.per_step
        first = -epoch * self.size % step  # samples that complete the last step of the previous epoch
        last = self.size - (self.size - first) % step
        for start in range(first, last, window * step):
            part = order[start : min(start + window * step, last)]
            steps = part[np.argsort(keys[part], kind="stable")].reshape(-1, step)
            part[:] = rng.permutation(steps).reshape(-1)
        return order

    def samples(self, positions: np.ndarray, order: Callable[[int], np.ndarray] | None = None) -> np.ndarray:
        """Return the sample at each position. ``order`` may be a cached ``self.order``."""
        epochs, order = positions // self.size, order or self.order
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            samples[mask] = order(int(epoch))[positions[mask] % self.size]
        return samples


def group_samples(conversations: Sequence[Conversation], by: str) -> np.ndarray | None:
    """Return the number of the group of each conversation, (n,), int64; None for ``by="none"``.

    Args:
        by: "reference": the first volume, or the conversation itself without volumes; "subject"; or "none".
    """
    if by == "none":
        return None
    if by == "subject":
        keys = [c.subject_id or c.task_id for c in conversations]
    else:
        keys = [c.volumes[0].image_path if c.volumes else c.task_id for c in conversations]
    return np.unique(keys, return_inverse=True)[1]


def to_table(conversations: Sequence[Conversation]) -> pa.Table:
    """Return a table with one column of conversations as JSON."""
    return pa.table({"conversation": pa.array([c.model_dump_json() for c in conversations], pa.large_string())})


def from_table(table: pa.Table, sample: int) -> Conversation:
    """Return the conversation at an index of the table."""
    return Conversation.model_validate_json(table["conversation"][sample].as_py())


def evaluation_rows(lengths: np.ndarray, rank: int, workers: int, batch_size: int) -> list[Rows]:
    """Return the rows of one worker in an evaluation, in chunks: every sample once, sorted by length, interleaved."""
    samples = np.argsort(lengths, kind="stable")[rank::workers]
    size = batch_size * max(1, ROWS_PER_CHUNK // batch_size)
    chunks = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [{"position": chunk, "sample": chunk} for chunk in chunks]


def batches(
    chunks: Iterable[Rows], batch_size: int, prefetch: int, make: Callable[[Rows], Any], name: str = "train"
) -> Iterator[Any]:
    """Iterate over batches of a worker's rows. Ray Data's threads make batches in advance.

    Args:
        chunks: rows; every chunk but the last holds whole batches.
        batch_size: rows per batch.
        prefetch: number of batches made in advance.
        make: makes a batch of its rows.
        name: of the dataset on Ray's dashboard, which adds two counters: "train_3_0".
    """
    import ray
    from ray.data.collate_fn import NumpyBatchCollateFn

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # suppress a warning about progress bars

    class Collate(NumpyBatchCollateFn):
        def __call__(self, rows: Rows) -> Any:
            return make(rows)

    for chunk in chunks:
        # from_arrow needs a Ray task with a free CPU for each block; in a sweep, two waiting trials can block each
        # other. from_items needs no task.
        values = zip(*(column.tolist() for column in chunk.values()), strict=True)
        items = [dict(zip(chunk, row, strict=True)) for row in values]
        rows = ray.data.from_items(items, override_num_blocks=max(1, ceil(len(items) / ROWS_PER_BLOCK)))
        rows.set_name(name)
        # Several threads make batches; keep their order.
        rows.context.execution_options.preserve_order = True
        rows.context.enable_progress_bars = False
        yield from rows.iter_torch_batches(
            batch_size=batch_size, prefetch_batches=prefetch, collate_fn=Collate(), device="cpu"
        )
