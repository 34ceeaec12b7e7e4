"""Order of samples, their distribution over workers, and iteration over batches with Ray Data.

A row of Ray Data is a micro-batch: its first position and the end of its positions. A position is an index in the whole
training; ``Plan`` gives the sample at each position, an index into the table of conversations. The table is one Arrow
column of JSON in Ray's object store, shared by the workers of a node.

Rows are generated in chunks, so memory does not grow with the length of the training.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from itertools import cycle, islice
from math import ceil
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.collate_fn import NumpyBatchCollateFn
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation

BATCHES_PER_BLOCK, BATCHES_PER_CHUNK = 256, 8192
PROCESSES, MIN_CPUS = 2, 8
"""Processes that make the micro-batches of a worker, and CPUs per GPU from which on ``data.loader=auto`` uses them."""


def sample_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the permutation of ``size`` samples in an epoch; it depends only on (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(size)


@dataclass(frozen=True)
class Plan:
    """Assignment of samples to steps and workers. A step may contain samples of two epochs.

    Position p is sample ``order(p // size)[p % size]``. A step takes the next ``workers * accumulate`` micro-batches of
    consecutive positions. No sample is dropped: the last step is completed by ``surplus`` positions of a further epoch.
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
    tokens: np.ndarray | None = field(default=None, compare=False)
    """(size,): number of tokens of each sample, for ``max_tokens``."""
    max_tokens: int = 0
    """Largest number of tokens of a micro-batch; 0: a micro-batch has ``batch_size`` samples."""
    packed: bool = False
    """Whether ``max_tokens`` counts no padding, because samples are packed into rows."""
    window: int = 16
    """Number of steps whose samples are sorted by length together."""
    sorted_by: int = 0
    """Samples per step for sorting; 0 means ``per_step``. A training that is resumed with another number of workers
    keeps the first value, because the order of samples depends on it."""

    @property
    def per_step(self) -> int:
        """Number of samples in a global batch; about their mean number with ``max_tokens``."""
        if self.max_tokens:
            assert self.tokens is not None
            return max(1, int(self.max_tokens / max(1.0, self.tokens.mean()))) * self.workers * self.accumulate
        return self.workers * self.batch_size * self.accumulate

    @property
    def steps(self) -> int:
        """Total number of optimizer steps."""
        return self.steps_from(0)

    def steps_from(self, start: int) -> int:
        """Return the number of optimizer steps from a position to the end."""
        if self.max_tokens:
            return sum(1 for _ in self.bounds(start)) if start else len(self._ends)
        return max(0, ceil((self.epochs * self.size - start) / self.per_step))

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps of the first epoch, rounded up."""
        if self.max_tokens:
            return int(np.searchsorted(self._ends, self.size)) + 1
        return ceil(self.size / self.per_step)

    @property
    def surplus(self) -> int:
        """Number of samples of the last step that lie beyond the last epoch."""
        end = int(self._ends[-1]) if self.max_tokens else self.steps * self.per_step
        return end - self.epochs * self.size

    @cached_property
    def _ends(self) -> np.ndarray:
        """The end of each step, (steps,), which ``max_tokens`` makes irregular."""
        return np.array([bounds[-1] for bounds in self.bounds()])

    @property
    def description(self) -> str:
        """One line with the numbers of samples, epochs and steps."""
        about, surplus = "about " * bool(self.max_tokens), self.surplus
        line = f"samples: {self.size} in each of {self.epochs} epochs, {self.steps} steps of {about}{self.per_step}"
        return line + (f"; the last step is filled up with {surplus} samples once more" if surplus else "")

    def bounds(self, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the bounds of the micro-batches of each step, from a position to the end.

        Yields:
            (workers * accumulate + 1,), int64. Micro-batch i has the positions ``bounds[i]`` to ``bounds[i + 1]``
            (exclusive), and belongs to worker ``i % workers``.
        """
        count = self.workers * self.accumulate
        while start < self.epochs * self.size:
            bounds = start + self.batch_size * np.arange(count + 1)
            if self.max_tokens:
                for i in range(count):
                    bounds[i + 1] = self._end_of_micro_batch(bounds[i])
            yield bounds
            start = int(bounds[-1])

    def _end_of_micro_batch(self, start: int) -> int:
        """Return the end of the largest micro-batch from a position that has at most ``max_tokens`` tokens."""
        assert self.tokens is not None
        tokens = self.tokens[self.samples(np.arange(start, start + self._most_samples))]
        sums = np.cumsum(tokens) if self.packed else np.maximum.accumulate(tokens) * np.arange(1, len(tokens) + 1)
        return start + max(1, int(np.searchsorted(sums, self.max_tokens, "right")))

    @cached_property
    def _most_samples(self) -> int:
        assert self.tokens is not None
        return max(1, self.max_tokens // max(1, int(self.tokens.min())))

    def micro_batches(self, rank: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield first position and end of each micro-batch of a worker, in order, from a position to the end.

        Each worker generates its own. Ray's ``split`` drops up to ``workers - 1`` rows and assigns blocks in the order
        of requests, so it is not reproducible.
        """
        for bounds in self.bounds(start):
            for i in range(rank, len(bounds) - 1, self.workers):
                yield int(bounds[i]), int(bounds[i + 1])

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
        """Return the samples at the positions ``start`` to ``stop``, and the seed of the random choices of each.

        Returns:
            Indices of samples, (n,), int64, and n tuples (seed, epoch, sample).
        """
        positions = np.arange(start, stop)
        samples, epochs = self.samples(positions), positions // self.size
        return samples, [(self.seed, int(epoch), int(i)) for epoch, i in zip(epochs, samples, strict=True)]

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

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample at each position. The orders of two epochs are cached."""
        epochs = positions // self.size
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            samples[mask] = self._cached_order(int(epoch))[positions[mask] % self.size]
        return samples

    @cached_property
    def _cached_order(self) -> Callable[[int], np.ndarray]:
        return lru_cache(maxsize=2)(self.order)

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}  # without caches


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


def evaluation_order(lengths: np.ndarray, rank: int, workers: int) -> np.ndarray:
    """Return the samples that one worker evaluates, sorted by length; each sample belongs to one worker."""
    return np.argsort(lengths, kind="stable")[rank::workers]


def slices(size: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of the batches of ``size`` samples."""
    return ((start, min(start + batch_size, size)) for start in range(0, size, batch_size))


def count_processes(loader: str, on_gpu: bool) -> int:
    """Return the number of processes that make the micro-batches of a worker, for ``data.loader``; 0: threads."""
    if loader == "auto" and on_gpu:
        found = ray.cluster_resources()
        loader = "processes" if found.get("CPU", 0) >= MIN_CPUS * found.get("GPU", 1) else "threads"
    return PROCESSES if loader == "processes" else 0


class RemoteMaker:
    """Calls a function that makes batches in other processes, and in this one until they have started.

    Args:
        make: the function of (start, stop). It is pickled.
        processes: number of processes on this node. They reserve no CPU, so that trials that wait for each other cannot
            block.
    """

    def __init__(self, make: Callable[[int, int], Any], processes: int) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0, scheduling_strategy=here)(_MakerProcess)
        self.make, self.actors = make, [actor.remote(make) for _ in range(processes)]
        self.starting, self.turns = [actor.start.remote() for actor in self.actors], cycle(self.actors)

    def __call__(self, start: int, stop: int) -> Any:
        """Return a batch, or raise the error that was raised in the other process. If it has died, make it here."""
        try:
            starting = self.starting  # another thread may change it
            if starting:
                _, starting = ray.wait(starting, num_returns=len(starting), timeout=0)
                self.starting = starting
            if starting:
                return self.make(start, stop)
            return ray.get(next(self.turns).make.remote(start, stop))
        except RayActorError:
            return self.make(start, stop)
        except RayTaskError as error:
            raise error.cause from None if isinstance(error.cause, UserError) else error

    def close(self) -> None:
        """End the processes."""
        for actor in self.actors:
            ray.kill(actor)


class _MakerProcess:
    def __init__(self, make: Callable[[int, int], Any]) -> None:
        self._make = make

    def start(self) -> None:
        """Make a batch, which loads all that the others need."""
        self._make(0, 1)

    def make(self, start: int, stop: int) -> Any:
        return self._make(start, stop)


def batches(
    bounds: Iterable[tuple[int, int]],
    make: Callable[[int, int], Any],
    load: Callable[[Any], Any] = lambda made: made,
    prefetch: int = 1,
    name: str = "train",
) -> Iterator[Any]:
    """Iterate over ``load(make(start, stop))``, in order, for each (start, stop) of ``bounds``.

    Args:
        make, load: called in a thread of Ray Data.
        prefetch: number of batches made in advance.
        name: of the dataset on Ray's dashboard, which adds two counters: "train_3_0".
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # suppress a warning about progress bars

    class Collate(NumpyBatchCollateFn):
        def __call__(self, rows: dict[str, np.ndarray]) -> Any:
            return load(make(int(rows["start"][0]), int(rows["stop"][0])))

    remaining = iter(bounds)
    while chunk := list(islice(remaining, BATCHES_PER_CHUNK)):
        # from_arrow needs a Ray task with a free CPU for each block; in a sweep, two waiting trials can block each
        # other. from_items needs no task.
        items = [{"start": start, "stop": stop} for start, stop in chunk]
        rows = ray.data.from_items(items, override_num_blocks=ceil(len(items) / BATCHES_PER_BLOCK))
        rows.set_name(name)
        # Several threads make batches; keep their order.
        rows.context.execution_options.preserve_order = True
        rows.context.enable_progress_bars = False
        yield from rows.iter_torch_batches(batch_size=1, prefetch_batches=prefetch, collate_fn=Collate(), device="cpu")
