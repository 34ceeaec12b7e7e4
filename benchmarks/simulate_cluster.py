"""Time and memory of the data pipeline for cohorts of up to a million conversations.

    .venv/bin/python benchmarks/simulate_cluster.py [conversations ...] [--at-once]

For each size, two Ray actors run the data pipeline of a training: rows through Ray Data, rendering, reading of small
volumes, collation. They read batches from the start and from the middle of eight epochs. All conversations have the
same content and different names; they share 64 volumes.

Times are CPU seconds of the slowest worker: to order an epoch, until the first batch, and per further batch. Memory is
the increase of a worker without the mapped table, and the use of Ray's object store without the table. --at-once
creates all rows before the first batch.
"""

import platform
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
from ray._private.internal_api import node_stats
from warm import conversation

from umbrella.cluster import start_ray
from umbrella.data import pipeline
from umbrella.data.batching import Collator
from umbrella.data.pipeline import Plan, batches, from_table
from umbrella.data.rendering import Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.data.tokenizer import tiny_tokenizer
from umbrella.modality import Modality
from umbrella.training.settings import ResourceSettings
from umbrella.volumes.store import VolumeStore

SIZES, WORKERS, BATCH_SIZE, EPOCHS, BATCHES, VOLUMES = (10_000, 100_000, 1_000_000), 2, 8, 8, 200, 64
MODALITIES = {"sMRI": Modality(grid=(4, 4, 4), patch=(2, 2, 2))}


def make_table(folder: Path, size: int) -> pa.Table:
    """Create a table like that of ``to_table``, in chunks and without reading files."""
    written = [conversation(folder, number).model_dump_json() for number in range(VOLUMES)]
    pieces = []
    for start in range(0, size, 50_000):
        names = range(start, min(start + 50_000, size))
        texts = [written[n % VOLUMES].replace(f'"task_id":"{n % VOLUMES}"', f'"task_id":"{n}"') for n in names]
        pieces.append(pa.array(texts, pa.large_string()))
    return pa.table({"conversation": pa.concat_arrays(pieces)})


@ray.remote(num_cpus=0.5)
class Worker:
    """One of the workers of a training, without a model."""

    def __init__(self, rank: int, table: pa.Table, folder: str, stretch: int) -> None:
        pipeline.BATCHES_PER_CHUNK = stretch
        self.rank, self.table = rank, table
        self.collate = Collator(Renderer(tiny_tokenizer(), MODALITIES), VolumeStore(folder, MODALITIES, 10_000))
        lengths = np.random.default_rng(0).integers(16, 512, table.num_rows).astype(np.int32)
        self.plan = Plan(table.num_rows, 0, EPOCHS, WORKERS, BATCH_SIZE, 1, lengths=lengths, window=3)
        self.before = own_memory()

    def order(self) -> float:
        """CPU seconds to order an epoch."""
        start = time.process_time()
        self.plan.order(0)
        return time.process_time() - start

    def run(self, position: int) -> dict[str, float]:
        """Read batches from a position on. Returns CPU seconds to the first and per further batch, and peak memory."""
        first, most = 0.0, 0.0
        asked = time.process_time()
        stream = batches(self.plan.micro_batches(self.rank, position), self._make, prefetch=2)
        bounds = self.plan.micro_batches(self.rank, position)
        for number, (batch, (start, stop)) in enumerate(islice(zip(stream, bounds, strict=False), BATCHES)):
            first = first or time.process_time() - asked
            assert batch.sample_indices.tolist() == self.plan.rows(start, stop)[0].tolist()
            if number % 20 == 0:
                most = max(most, own_memory())
        each = (time.process_time() - asked - first) / (BATCHES - 1)
        return {"first": first, "each": each, "memory": most - self.before}

    def _make(self, start: int, stop: int) -> Any:
        samples, _ = self.plan.rows(start, stop)
        examples = [self.collate.renderer.render(from_table(self.table, int(i))) for i in samples]
        return self.collate(examples, MaskPolicy(), indices=samples)


def own_memory() -> float:
    """Unshared MiB of this process, without the table, which all workers of a node map."""
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / 2**20


def in_store() -> float:
    """MiB in Ray's object store."""
    (node,) = ray.nodes()
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
    return stats.object_store_bytes_used / 2**20


def measure(size: int, stretch: int) -> str:
    """Measure one row of the table."""
    with tempfile.TemporaryDirectory() as name:
        table = make_table(Path(name), size)
        text = table.nbytes / 2**20
        reference, _ = ray.put(table), time.sleep(2)  # until Ray has counted it
        before = in_store()
        del table
        workers = [Worker.remote(rank, reference, f"{name}/store", stretch) for rank in range(WORKERS)]
        order = max(ray.get([worker.order.remote() for worker in workers]))
        middle = EPOCHS * size // 2 // (WORKERS * BATCH_SIZE) * WORKERS * BATCH_SIZE
        ray.get([worker.run.remote(0) for worker in workers])  # imports
        found = [run for place in (0, middle) for run in ray.get([w.run.remote(place) for w in workers])]
        stored = in_store() - before
        for worker in workers:
            ray.kill(worker)
    worst = {what: max(run[what] for run in found) for what in found[0]}
    return (
        f"{size:>13} {text:>10.0f} {order:>9.2f} {worst['first']:>12.2f} {1000 * worst['each']:>10.1f}"
        f" {worst['memory']:>11.0f} {stored:>13.1f}"
    )


def main(*words: str) -> None:
    """Measure and print."""
    at_once = "--at-once" in words
    sizes = [int(word) for word in words if word.isdigit()] or SIZES
    start_ray(ResourceSettings(), log_to_driver=False)
    cpus, memory = psutil.cpu_count(), psutil.virtual_memory().total / 2**30
    machine = f"{platform.machine()}, {cpus} CPUs, {memory:.0f} GiB, Python {platform.python_version()}"
    print(f"{machine}, Ray {ray.__version__}")
    print(f"{WORKERS} workers, batches of {BATCH_SIZE}, {EPOCHS} epochs, {BATCHES} batches a reading")
    print("conversations  table MiB   order, s  1st batch, s  batch, ms  worker, MiB  in store, MiB")
    for size in sizes:
        print(measure(size, 2**62 if at_once else pipeline.BATCHES_PER_CHUNK), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
