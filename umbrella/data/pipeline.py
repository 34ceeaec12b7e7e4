"""Ray Data: references in a seeded order, dealt to the workers; volumes join them where batches are made.

A row is two numbers: ``position``, its place in the whole training, and ``sample``, an index into the table of
conversations. The table is one Arrow column of JSON in Ray's object store, shared by every worker of a node.

Rows are made a stretch at a time, so that a training of millions of samples needs no more memory than a short one.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from umbrella.conversations.schema import Conversation

if TYPE_CHECKING:
    from ray.data import Dataset

ROWS_PER_BLOCK, ROWS_PER_STRETCH = 1024, 32768
Rows = Mapping[str, np.ndarray]
"""``position`` and ``sample``, (rows,) each."""


def sample_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of ``size`` samples in an epoch: a permutation that depends on (seed, epoch) and nothing else."""
    return np.random.default_rng((seed, epoch)).permutation(size)


@dataclass(frozen=True)
class Plan:
    """Which sample each worker sees at each step. Epochs follow each other without a seam.

    Position p is sample ``order(p // size)[p % size]``. A step takes the next ``workers * batch_size * accumulate``
    positions. The last step may reach past the last epoch: ``surplus`` positions, taken from the order that a further
    epoch would have. Nothing is dropped.
    """

    size: int
    seed: int
    epochs: int
    workers: int
    batch_size: int
    accumulate: int
    lengths: np.ndarray | None = field(default=None, compare=False)
    """(size,): samples of similar length share a step and lie side by side in it; None leaves them where they fall."""
    window: int = 16
    """Steps whose samples are sorted among themselves."""
    sorted_by: int = 0
    """Samples in a step as sorting has them; 0: ``per_step``. A training that goes on with other workers keeps what it
    began with, or the order, and with it what was seen already, would change."""

    @property
    def per_step(self) -> int:
        """Samples in one global batch."""
        return self.workers * self.batch_size * self.accumulate

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.steps_from(0)

    def steps_from(self, start: int) -> int:
        """Optimizer steps from a position to the end."""
        return max(0, ceil((self.epochs * self.size - start) / self.per_step))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps after which an epoch has been seen."""
        return ceil(self.size / self.per_step)

    @property
    def surplus(self) -> int:
        """Samples of the last step that lie past the last epoch."""
        return self.steps * self.per_step - self.epochs * self.size

    @property
    def description(self) -> str:
        """One line on what is seen how often, and on what is seen once more than that."""
        line = f"samples: {self.size} in each of {self.epochs} epochs, {self.steps} steps of {self.per_step}"
        return line + (f"; the last step is filled up with {self.surplus} samples once more" if self.surplus else "")

    def positions(self, rank: int, start: int = 0, steps: int | None = None) -> np.ndarray:
        """The positions that one worker sees, in order, from position ``start`` on: of so many steps, or of all."""
        steps = self.steps_from(start) if steps is None else steps
        everything = np.arange(start, start + steps * self.per_step)
        return everything.reshape(-1, self.workers, self.batch_size)[:, rank].reshape(-1)

    def rows(self, rank: int, start: int) -> Iterator[Rows]:
        """One worker's rows from a position to the end, in order, in stretches of whole steps.

        Each worker makes its own. Ray's split drops up to ``workers - 1`` rows and deals blocks by who asks first; this
        is exact, the same in every run, and follows from where the worker is and how many there are.
        """
        steps, orders = max(1, ROWS_PER_STRETCH // (self.batch_size * self.accumulate)), dict[int, np.ndarray]()
        for first in range(0, self.steps_from(start), steps):
            place = start + first * self.per_step
            positions = self.positions(rank, place, min(steps, self.steps_from(place)))
            epochs = range(int(positions[0]) // self.size, int(positions[-1]) // self.size + 1)
            # A stretch is much shorter than a large epoch, whose order is made once.
            orders = {epoch: orders[epoch] if epoch in orders else self.order(epoch) for epoch in epochs}
            yield {"position": positions, "sample": self.samples(positions, orders)}

    def rng_keys(self, rows: Rows) -> list[tuple[int, int, int]]:
        """(seed, epoch, sample) of each row: what its random choices are drawn from."""
        epochs = rows["position"] // self.size
        return [(self.seed, int(epoch), int(sample)) for epoch, sample in zip(epochs, rows["sample"], strict=True)]

    def order(self, epoch: int) -> np.ndarray:
        """The samples of an epoch in order: ``sample_order``, and with lengths each window of it sorted into steps.

        The steps of a window come in a drawn order. A step that two epochs share is left unsorted.
        """
        order = sample_order(self.seed, epoch, self.size)
        if self.lengths is None:
            return order
        rng = np.random.default_rng((self.seed, epoch, 1))
        step = self.sorted_by or self.per_step
        first = -epoch * self.size % step  # these complete the step that the epoch before has begun
        last = self.size - (self.size - first) % step
        for start in range(first, last, self.window * step):
            part = order[start : min(start + self.window * step, last)]
            steps = part[np.argsort(self.lengths[part], kind="stable")].reshape(-1, step)
            part[:] = rng.permutation(steps).reshape(-1)
        return order

    def samples(self, positions: np.ndarray, orders: Mapping[int, np.ndarray] = MappingProxyType({})) -> np.ndarray:
        """The sample at each position; ``orders`` are those of epochs that are known already."""
        epochs = positions // self.size
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order = orders[int(epoch)] if int(epoch) in orders else self.order(int(epoch))
            samples[here] = order[positions[here] % self.size]
        return samples


def to_table(conversations: Sequence[Conversation]) -> pa.Table:
    """Conversations as one column of JSON."""
    return pa.table({"conversation": pa.array([c.model_dump_json() for c in conversations], pa.large_string())})


def from_table(table: pa.Table, sample: int) -> Conversation:
    """The conversation at an index."""
    return Conversation.model_validate_json(table["conversation"][sample].as_py())


def evaluation_rows(lengths: np.ndarray, rank: int, workers: int, batch_size: int) -> list[Rows]:
    """One worker's rows of an evaluation, in stretches: every sample once, by length, dealt in turn."""
    samples = np.argsort(lengths, kind="stable")[rank::workers]
    stretch = batch_size * max(1, ROWS_PER_STRETCH // batch_size)
    parts = [samples[start : start + stretch] for start in range(0, len(samples), stretch)]
    return [{"position": part, "sample": part} for part in parts]


def batches(
    stretches: Iterable[Rows], batch_size: int, prefetch: int, make: Callable[[Rows], Any], name: str = ""
) -> Iterator[Any]:
    """Iterate over a worker's rows; ``make`` runs ahead of its use, in Ray Data's threads.

    Args:
        stretches: of whole batches, but for the last one.
        make: is given the rows of a batch.
        name: what Ray's dashboard calls this.
    """
    from ray.data.collate_fn import NumpyBatchCollateFn

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that there are no progress bars

    class Collate(NumpyBatchCollateFn):
        def __call__(self, rows: Rows) -> Any:
            return make(rows)

    for stretch in stretches:
        rows = _dataset(stretch)
        if name:
            rows.set_name(name)
        # Batches are made by several threads; without this they would come in the order in which those finish.
        rows.context.execution_options.preserve_order = True
        rows.context.enable_progress_bars = False  # of rows that are there already; the training has a bar of its own
        yield from rows.iter_torch_batches(
            batch_size=batch_size, prefetch_batches=prefetch, collate_fn=Collate(), device="cpu"
        )


def _dataset(columns: Rows) -> "Dataset":
    import ray

    # The one way that needs no Ray task: from_arrow has one for each block, which waits for a whole free CPU. In a
    # sweep there may be none, and two trials that both waited for one waited for ever.
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    rows = [dict(zip(columns, row, strict=True)) for row in values]
    return ray.data.from_items(rows, override_num_blocks=max(1, ceil(len(rows) / ROWS_PER_BLOCK)))
