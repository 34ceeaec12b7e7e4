"""Check that two commits give the same results, bit for bit on a CPU: python benchmarks/compare_commits.py BASE

The working tree is compared with the commit BASE, in the same environment. Each runs a small training, the same one
killed and resumed, a sweep without a scheduler, and the baseline. The comparison covers losses and metrics of every
step, the order of samples, the tensors of the last checkpoint, and the trials of the sweep. The exit status is 1 if
anything differs.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent.parent
SETTINGS = {
    "cohort.subjects": 24,
    "cohort.spacing": 8.0,
    "cohort.functional_subjects": 4,
    "cohort.diffusion_subjects": 4,
    "modalities.sMRI": {"grid": [8, 8, 8], "patch": [4, 4, 4]},
    "modalities.dMRI": {"grid": [8, 8, 8], "patch": [8, 8, 8]},
    "modalities.fMRI": {"grid": [4, 4, 4, 4], "patch": [4, 4, 4, 2]},
    "model.width": 16,
    "train.epochs": 3,
    "train.batch_size": 4,
    "train.accumulate": 1,
    "train.augment.shift": 0.2,
    "train.augment.noise": 0.1,
    "optim.warmup": 2,
    "data.log_samples": True,
    "tracking.model": False,
    "evaluate.at_end": False,
}
SWEEP = {
    "tune.scheduler": "none",
    "tune.space.optim.lr": {"grid": [1e-3, 3e-3]},
    "tune.space.mask.supervise": {"grid": ["last_assistant", "all"]},
}
BASELINE = {"baseline.epochs": 3, "baseline.channels": [8, 8, 8], "evaluate.bootstrap": 100}
SAME = ("train/loss", "train/lr", "train/grad_norm", "train/supervised_tokens")
"""Metrics that depend only on settings and data, as all metrics of evaluations do."""


def start(tree: Path, script: str, storage: Path, name: str, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start a script of ``tree``; its output goes to ``<storage>/<name>.txt``."""
    storage.mkdir(parents=True, exist_ok=True)
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]  # JSON is YAML
    command = [
        sys.executable,
        str(tree / "experiments" / script),
        f"name={name}",
        f"resources.storage={storage}",
        *words,
    ]
    with (storage / f"{name}.txt").open("ab") as output:
        environment = os.environ | {"PYTHONPATH": str(tree)}
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=tree)


def finish(script: subprocess.Popen[bytes], storage: Path, name: str) -> None:
    """Wait for a script, and end with its output if it failed."""
    if script.wait():
        sys.exit(f"{name} failed:\n{(storage / f'{name}.txt').read_text()}")


def kill_after_first_checkpoint(script: subprocess.Popen[bytes], training: Path) -> None:
    """Kill a script and all of its processes when its training has a complete checkpoint."""
    while not list(training.glob("step_*")):
        if script.poll() is not None:
            sys.exit(f"{training.name} ended before it had a checkpoint")
        time.sleep(0.02)
    family = [script, *psutil.Process(script.pid).children(recursive=True)]
    for process in family:
        process.kill()
    script.wait()
    psutil.wait_procs(family[1:])


def run_all(tree: Path, storage: Path) -> dict[str, Any]:
    """Run the four scenarios in ``tree``, and return the values to compare."""
    finish(start(tree, "train.py", storage, "whole", SETTINGS), storage, "whole")
    kill_after_first_checkpoint(start(tree, "train.py", storage, "killed", SETTINGS), storage / "trainings" / "killed")
    finish(start(tree, "train.py", storage, "killed", SETTINGS), storage, "killed")
    finish(start(tree, "tune.py", storage, "sweep", SETTINGS | SWEEP), storage, "sweep")
    finish(start(tree, "baseline.py", storage, "baseline", SETTINGS | BASELINE), storage, "baseline")
    found: dict[str, Any] = dict(metrics(storage))
    for training in (storage / "trainings").iterdir():
        if training.is_dir() and not training.name.startswith("."):
            checkpoint = sorted(training.glob("step_*"))[-1]
            found |= {f"{training.name}: {key}": value for key, value in tensors(checkpoint)}
    lines = (storage / "trainings" / "whole" / "samples_0.jsonl").read_text().splitlines()
    entries = map(json.loads, lines)
    found["whole: order of samples"] = [entry["task_ids"] for entry in entries if "task_ids" in entry]
    return found


def metrics(storage: Path) -> Iterator[tuple[str, Any]]:
    """(run and metric, [(step, value), ...]) of every run; a run is named by its name, a trial by its settings."""
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "umbrella"]
    for run in client.search_runs([experiment.experiment_id]):
        swept = {key: run.data.params.get(key) for key in ("optim.lr", "mask.supervise")}
        is_named = run.info.run_name.startswith(("whole", "killed", "sweep", "baseline"))
        name = run.info.run_name if is_named else f"trial {swept}"
        for metric in run.data.metrics:
            if metric.startswith("eval/") or metric in SAME:
                # A step that is repeated after a kill has several values.
                values = {m.step: m.value for m in client.get_metric_history(run.info.run_id, metric)}
                yield f"{name}: {metric}", sorted(values.items())


def tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a checkpoint's weights, optimizer state and random number generators."""
    of_baseline = checkpoint / "weights.pt"
    yield from (
        torch.load(of_baseline) if of_baseline.exists() else load_file(checkpoint / "model.safetensors")
    ).items()
    open_values: list[tuple[str, Any]] = [("state", torch.load(checkpoint / "state.pt", weights_only=True))]
    while open_values:
        name, value = open_values.pop()
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            open_values += [(f"{name}.{key}", item) for key, item in items]
        elif isinstance(value, torch.Tensor):
            yield name, value


def is_same(a: Any, b: Any) -> bool:
    """Whether two values are the same, bit for bit."""
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def main() -> None:
    """Run both commits, and print every difference."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    base = subprocess.run(["git", "rev-parse", sys.argv[1]], cwd=HERE, check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory(prefix="compare-") as temporary:
        tree = Path(temporary) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", tree, base.stdout.strip()], cwd=HERE, check=True
        )
        try:
            then, now = (run_all(t, Path(temporary) / name) for t, name in ((tree, "base"), (HERE, "head")))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=HERE, check=True)
    differences = [name for name in sorted({*then, *now}) if not is_same(then.get(name), now.get(name))]
    resumed = [key for key in now if key.startswith("whole: ") and key.replace("whole", "killed", 1) in now]
    differences += [
        f"{key} (whole and killed, in the working tree)"
        for key in resumed
        if not is_same(now[key], now[key.replace("whole", "killed", 1)])
    ]
    print(
        f"{len(now)} values compared with {base.stdout.strip()[:9]}, {len(resumed)} of whole and killed with each other"
    )
    sys.exit("\n".join(["these differ:", *differences]) if differences else 0)


if __name__ == "__main__":
    main()
