"""Estimate time, storage and cost for a large cohort: the tables of docs/scaling.md, from measured constants.

    python benchmarks/scaling.py [subjects=40000] [price=3.0] [any constant=...]

A sample is one conversation about two 96^3 volumes, as in gpu_training.py; each subject has one.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from math import ceil, log2

GPUS, TRIALS = (8, 64, 512), 64


def constant(value: float, meaning: str, source: str) -> float:
    return field(default=value, metadata={"meaning": meaning, "source": source})


@dataclass(frozen=True)
class Constants:
    """Constants of the tables."""

    subjects: float = constant(40_000, "subjects", "UK Biobank, about; yours")
    epochs: float = constant(8, "epochs of a training", "the default of train.epochs")
    volumes: float = constant(2, "volumes of a sample", "gpu_training.py")
    grid: float = constant(96, "voxels along an axis", "ray_configs/grid_96.yaml")
    frames: float = constant(490, "frames of a resting-state series", "UK Biobank's protocol; yours")
    voxel: float = constant(2, "bytes of a voxel in the store, fp16", "umbrella/volumes/store.py")
    scan: float = constant(7.0e6, "bytes of a .nii.gz scan", "benchmarks/README.md, cold.py, with noise")
    decoded: float = constant(16.3, "volumes/s that a core decodes", "benchmarks/README.md, cold.py, with noise")
    hashed: float = constant(5.0e8, "bytes/s that a core hashes", "docs/decisions.md: 2 MB in 4 ms")
    samples: float = constant(267, "samples/s of one H200, end to end", "benchmarks/README.md, gpu_training.py")
    batch: float = constant(128, "samples of a GPU's step", "results/gpu_training_h200.txt")
    doubled: float = constant(1.96, "two GPUs to one", "benchmarks/README.md")
    start: float = constant(52.6, "seconds from fit() to the first step", "results/gpu_training_h200.txt, compiled")
    embedder: float = constant(4.72e6, "weights of the volume embedder", "16^3 voxels to a width of 1,152")
    model: float = constant(8.6e8, "weights of the 0.5B shape with its tower", "gpu_training.py, LAYER and SHAPES")
    a100: float = constant(0.315, "an A100's speed to an H200's", "assumed: by bfloat16 peaks, 312 to 990 TFLOP/s")
    node: float = constant(8, "GPUs of a node", "assumed")
    link: float = constant(5.0e9, "bytes/s that a node reads from shared storage", "assumed; yours")
    storage: float = constant(5.0e10, "bytes/s that shared storage gives in all", "assumed; yours")
    price: float = constant(3.0, "price of a GPU's hour", "assumed; yours")

    @property
    def volume(self) -> float:
        """Bytes of an array in the volume store."""
        return self.grid**3 * self.voxel

    def rate(self, gpus: int) -> float:
        """Samples/s of one training. Each doubling of GPUs is assumed to be as efficient as the first."""
        return self.samples * self.doubled ** log2(gpus)


def tables(c: Constants) -> Iterator[str]:
    """The tables, as Markdown."""
    yield table(
        ("constant", "value", "", "from"),
        [(f.name, f"{getattr(c, f.name):,.9g}", f.metadata["meaning"], f.metadata["source"]) for f in fields(c)],
    )
    yield from (store(c), sources(c), one_training(c), network(c), sweep(c))


def store(c: Constants) -> str:
    def row(what: str, array: float, count: float, seconds: float) -> tuple[str, ...]:
        return what, size(array), size(array * count), f"{seconds / 3600:,.1f} core hours", duration(seconds / 256)

    volumes, frames = c.subjects * c.volumes, c.subjects * c.frames
    return table(
        ("the store", "an array", "all", "decoding", "of it on 256 cores"),
        [
            row(f"{c.volumes:g} volumes a subject", c.volume, volumes, volumes / c.decoded),
            row(f"a series of {c.frames:g} frames a subject", c.volume * c.frames, c.subjects, frames / c.decoded),
        ],
    )


def sources(c: Constants) -> str:
    scans = c.subjects * c.volumes * c.scan
    hours = scans / c.hashed / 3600
    return f"Before that the scans are read and hashed once: {size(scans)}, {hours:.1f} hours of one core."


def one_training(c: Constants) -> str:
    rows = []
    for gpus in GPUS:
        for card, speed in (("H200", 1.0), ("A100, estimated", c.a100)):
            rate = c.rate(gpus) * speed
            seconds = c.subjects * c.epochs / rate
            hours = gpus * (seconds + c.start) / 3600
            row = f"{gpus} {card}", f"{c.subjects / (c.batch * gpus):.1f}", f"{rate:,.0f}", duration(seconds)
            rows.append((*row, f"{c.start / (seconds + c.start):.0%}", f"{hours:.1f}", f"{hours * c.price:,.0f}"))
    heading = "one training on", "steps an epoch", "samples/s", f"{c.epochs:g} epochs", "start", "GPU hours", "price"
    return table(heading, rows)


def network(c: Constants) -> str:
    rows, all_volumes = [], c.subjects * c.volumes * c.volume
    for gpus in GPUS:
        nodes = ceil(gpus / c.node)
        read = c.rate(gpus) * c.volumes * c.volume
        misses = sum((1 - 1 / nodes) ** epoch for epoch in range(int(c.epochs))) / c.epochs
        copied = duration(all_volumes / min(c.link, c.storage / nodes))
        step = c.batch * gpus / c.rate(gpus)
        sent = [f"{8 * (gpus - 1) / gpus * weights / step / 1e9:.2g} GB/s" for weights in (c.embedder, c.model)]
        row = f"{gpus} on {nodes} nodes", f"{read / 1e9:.1f} GB/s", f"{misses:.0%}", size(all_volumes), copied
        rows.append((*row, *sent))
    heading = "H200s", "volumes that all read", "from shared storage, with `node_store`"
    return table((*heading, "a node's copy of all", "to fill it", "gradients a GPU, embedder", "all weights"), rows)


def sweep(c: Constants) -> str:
    trial = c.start + c.epochs * c.subjects / c.samples
    hours = TRIALS * trial / 3600
    rows = [
        (f"{gpus} H200", f"{min(gpus, TRIALS)}", duration(ceil(TRIALS / gpus) * trial), f"{hours:.0f}",
         f"{hours * c.price:,.0f}")
        for gpus in GPUS
    ]  # fmt: skip
    return table((f"{TRIALS} trials, a GPU each, on", "at once", "all", "GPU hours", "price"), rows)


def size(count: float) -> str:
    """Format a number of bytes with a decimal unit."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *rows))


def text(c: Constants) -> str:
    return "\n\n".join(tables(c))


if __name__ == "__main__":
    words = dict(word.split("=") for word in sys.argv[1:])
    print(text(Constants(**{name: float(value) for name, value in words.items()})))
