"""Does a training with float8 frozen weights end as well: several seeds of it beside bfloat16, on the phantom cohort.

    python benchmarks/float8_training.py [folder=..] [seeds=3] [epochs=20] [frozen=same,float8] [name=value]

A tiny model learns the cohort. Its volume embedder gets new random weights, and is trained again with everything else
frozen: as a sweep over the seed and ``model.frozen_dtype``, by default on one GPU.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from umbrella.config import load_settings
from umbrella.inference.model import Umbrella
from umbrella.training.checkpoint_files import best_checkpoint
from umbrella.training.run import run_training
from umbrella.tuning.sweep import run_sweep


def make_base(folder: Path, settings: dict[str, Any]) -> str:
    """Train a model and save it with a new embedder."""
    chosen = load_settings(overrides=settings | {"name": "base", "evaluate.at_end": False, "tracking.model": False})
    training = run_training(chosen, lambda things, what: things)
    best = best_checkpoint(training, chosen.tune.metric, chosen.tune.mode)
    assert best
    umbrella = Umbrella.from_checkpoint(best)
    for embedder in umbrella.model.embedder.by_modality.values():
        embedder.reset_parameters()
    umbrella.save_pretrained(folder / "base")
    return str(folder / "base")


def main(words: list[str]) -> None:
    """Measure and print."""
    given: dict[str, Any] = dict(word.split("=", 1) for word in words)
    folder = Path(given.pop("folder", None) or tempfile.mkdtemp())
    seeds, frozen = int(given.pop("seeds", 3)), given.pop("frozen", "same,float8").split(",")
    settings = {"resources.storage": str(folder / "runs"), "train.epochs": 20, "resources.cpus_per_worker": 1} | given
    base = make_base(folder, settings)
    swept = {
        "model.checkpoint": base,
        "model.train": "embedder",
        "model.dtype": "bfloat16",
        "tune.space": {"model.frozen_dtype": {"grid": frozen}, "seed": {"grid": list(range(seeds))}},
        "tune.scheduler": "none",
        "tracking.model": False,
    }
    result = run_sweep(load_settings(overrides=settings | swept))
    for kind in frozen:
        ends = [trial.curve[-1] for trial in result.trials if trial.point["model.frozen_dtype"] == kind]
        names = [name for name in ends[0] if name == "train/loss" or name.startswith("eval/")]
        for name in names:
            values = [float(end[name]) for end in ends]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(
                json.dumps(
                    {"frozen": kind, "metric": name, "mean": statistics.mean(values), "sd": spread, "all": values}
                )
            )


if __name__ == "__main__":
    main(sys.argv[1:])
