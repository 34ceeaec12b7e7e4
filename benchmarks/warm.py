"""Read volumes from the store to collated batches: Ray Data compared with a torch DataLoader with two workers.

    .venv/bin/python benchmarks/warm.py [volumes] [batch size]

Three variants read one store of 96^3 fp16 arrays in the page cache in turns: `ray` is the pipeline of a training (Ray
Data, rendering, masks, volumes copied into the batch); `loader` does the same in a DataLoader with two worker
processes; `plain` is a DataLoader that only stacks the arrays.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from umbrella.cluster import start_ray
from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Batch, Collator
from umbrella.data.pipeline import Plan, batches, from_table, to_table
from umbrella.data.rendering import Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.data.tokenizer import tiny_tokenizer
from umbrella.modality import Modality
from umbrella.training.settings import ResourceSettings
from umbrella.volumes.store import VolumeStore

ROUNDS = 5
MODALITIES = {"sMRI": Modality(grid=(96, 96, 96), patch=(16, 16, 16))}


def conversation(folder: Path, number: int) -> Conversation:
    """Write a volume of 4^3 voxels, which the store resizes to 96^3, and return a conversation about it."""
    import nibabel as nib

    path = folder / f"{number}.nii"
    nib.save(nib.Nifti1Image(np.random.default_rng(number).normal(size=(4, 4, 4)).astype(np.float32), np.eye(4)), path)
    image = {"type": "image", "modality": "sMRI", "image_path": str(path)}
    return Conversation.model_validate(
        {
            "task_id": str(number),
            "task_type": "T1",
            "conversations": [
                {"role": "user", "content": [image, {"type": "text", "text": "What is the sex of this subject?"}]},
                {"role": "assistant", "content": "male."},
            ],
        }
    )


@dataclass
class Maker:
    """Makes batches for all variants."""

    store: VolumeStore
    table: pa.Table
    paths: list[str]
    renderer: Renderer
    plan: Plan

    def batch(self, samples: Iterable[int]) -> Batch:
        """Make a batch as the worker of a training does."""
        examples = [self.renderer.render(from_table(self.table, int(i))) for i in samples]
        return Collator(self.renderer, self.store)(examples, MaskPolicy())

    def at(self, start: int, stop: int) -> Batch:
        """Make the batch of the positions ``start`` to ``stop``."""
        return self.batch(self.plan.rows(start, stop)[0])


@dataclass
class Samples(Dataset):
    """Dataset of sample numbers in a given order."""

    order: list[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> int:
        return self.order[index]


@dataclass
class Arrays(Samples):
    """Dataset of arrays in a given order."""

    maker: Maker

    def __getitem__(self, index: int) -> torch.Tensor:
        into = np.empty((96, 96, 96), np.float16)
        self.maker.store.read(self.maker.paths[self.order[index]], "sMRI", into)
        return torch.from_numpy(into)


def rates(stream: Iterable[Any], batch_size: int, batches_per_round: int) -> list[float]:
    """Volumes per second in each round of a stream. Each batch is read once."""
    found, start = [], time.perf_counter()
    for number, batch in enumerate(stream, start=1):
        voxels = batch if isinstance(batch, torch.Tensor) else batch.pixel_values["sMRI"].voxels
        voxels[:, 0, 0, 0].sum()
        if number % batches_per_round == 0:
            found.append(batch_size * batches_per_round / (time.perf_counter() - start))
            start = time.perf_counter()
    return found


def main(size: int = 400, batch_size: int = 4) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        conversations = [conversation(folder, i) for i in range(size)]
        store = VolumeStore(folder / "store", MODALITIES, 2**31)
        paths = [c.volumes[0].image_path for c in conversations]
        for path in paths:
            store.get(path, "sMRI")
        plan = Plan(size, 0, ROUNDS, 1, batch_size, 1)
        order = plan.samples(np.arange(ROUNDS * size)).tolist()
        maker = Maker(store, to_table(conversations), paths, Renderer(tiny_tokenizer(), MODALITIES), plan)
        workers: dict[str, Any] = {"batch_size": batch_size, "num_workers": 2, "multiprocessing_context": "forkserver"}
        per_round = size // batch_size
        found = {}
        # Alternate, so that all variants are affected if the machine slows down.
        for way in ("plain", "loader", "ray", "plain", "loader", "ray"):
            if way == "ray":
                start_ray(ResourceSettings(), log_to_driver=False)
                stream: Iterable[Any] = batches(plan.micro_batches(0), maker.at, prefetch=2)
            elif way == "loader":
                stream = DataLoader(Samples(order), collate_fn=maker.batch, **workers)
            else:
                stream = DataLoader(Arrays(order, maker), **workers)
            # The first round is warm-up: processes start, pages are touched.
            found.setdefault(way, []).extend(rates(stream, batch_size, per_round)[1:])
        start = time.perf_counter()
        for path in paths:
            store.read(path, "sMRI", np.empty((96, 96, 96), np.float16))
        copy = (time.perf_counter() - start) / size
    middle = {way: statistics.median(of_way) for way, of_way in found.items()}
    for way, of_way in found.items():
        print(f"{way:>7}: {middle[way]:6.0f} volumes/s ({len(of_way)} rounds, {min(of_way):.0f} to {max(of_way):.0f})")
    print(f"ray / loader {middle['ray'] / middle['loader']:.2f}, ray / plain {middle['ray'] / middle['plain']:.2f}")
    print(f"finding and reading an array alone: {1000 * copy:.2f} ms a volume, {0.00177 / copy:.1f} GB/s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
