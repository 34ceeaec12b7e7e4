"""Kill the processes of a sweep at random, resume it, and check that its runs are those of an undisturbed sweep.

python -m tests.faults.sweep_kills [--trials 8] [--kills 5] [--seed 0]

A kill is SIGKILL to the script, to the process of a trial, or to the workers of a training, at a random moment. If the
script ends, `tune.py --resume last` is started. At the end MLflow must hold one finished run per trial, each with one
loss for each step and one metric for each evaluation, and no trial may have been trained twice.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from tests.conftest import SMALL
from tests.faults.fault_injection import (
    LONGER,
    STEPS,
    command_line,
    count_batches,
    environment_without_ray,
    kill,
    kill_workers,
    learned_samples,
)
from umbrella.config import Settings, load_settings
from umbrella.paths import SWEEPS
from umbrella.tracking.mlflow_logger import OUTCOME, PARENT, TRIAL
from umbrella.tracking.store import tracking_uri

TUNE = Path(__file__).resolve().parents[2] / "experiments" / "tune.py"


def kill_trial(script: subprocess.Popen, draw: random.Random) -> int:
    """Kill the process of one trial; return the number of killed processes."""
    trials = [p for p in psutil.Process(script.pid).children(recursive=True) if "ray::ImplicitFunc." in command_line(p)]
    return kill(trials and [draw.choice(trials)])


KINDS: dict[str, Callable[[subprocess.Popen, random.Random], int]] = {
    "SIGKILL to the script": lambda script, draw: script.kill() or 1,
    "SIGKILL to a trial": kill_trial,
    "SIGKILL to the workers": lambda script, draw: kill_workers(script.pid),
}


def start(settings: Settings, resume: bool) -> subprocess.Popen:
    """Start the script of the sweep. Its output is appended to ``output.txt`` in the storage folder."""
    storage = Path(settings.resources.storage)
    file = storage / "sweep.yaml"
    file.write_text(settings.to_yaml(), encoding="utf-8")
    arguments = ["--resume", "last", f"resources.storage={storage}"] if resume else [str(file)]
    with (storage / "output.txt").open("a") as out:
        return subprocess.Popen(
            [sys.executable, TUNE, *arguments], stdout=out, stderr=out, env=environment_without_ray()
        )


def count_sweep_batches(settings: Settings) -> int:
    """Count the batches of all trials, with repeated ones."""
    return sum(count_batches(trial) for trial in Path(settings.resources.storage).glob("sweeps/*/trials/*/"))


def sweep_with_kills(settings: Settings, draw: random.Random, kills: int, log: Callable[[str], None]) -> int:
    """Run a sweep to its end with this number of kills; return the number of kills that reached a process.

    Raises:
        RuntimeError: the script failed.
    """
    script, arrived, trials = start(settings, resume=False), 0, len(settings.tune.space["optim.lr"]["grid"])
    wait = trials * STEPS // (kills + 2)
    while arrived < kills:
        until = count_sweep_batches(settings) + draw.randint(1, wait)
        while script.poll() is None and count_sweep_batches(settings) < until:
            time.sleep(0.05)
        if script.poll() is not None:
            break
        kind = draw.choice(list(KINDS))
        if not KINDS[kind](script, draw):
            continue
        arrived += 1
        log(f"{kind} after {until} batches")
        if kind == "SIGKILL to the script":
            script.wait()
            script = start(settings, resume=True)
    status = script.wait(900)
    if status:
        raise RuntimeError(f"the script ended with status {status}; see {settings.resources.storage}/output.txt")
    return arrived


def find_faults(settings: Settings) -> list[str]:
    """Differences between the runs of the sweep in MLflow and those of an undisturbed sweep."""
    client = MlflowClient(tracking_uri(settings.resources.storage))
    runs = client.search_runs([client.get_experiment_by_name(settings.experiment).experiment_id])
    trials = [run for run in runs if PARENT in run.data.tags]
    every = settings.train.evaluate_every
    found: dict[str, tuple[Any, Any]] = {
        "number of sweeps": (len(runs) - len(trials), 1),
        "swept values": (
            sorted(float(run.data.params["optim.lr"]) for run in trials),
            sorted(float(value) for value in settings.tune.space["optim.lr"]["grid"]),
        ),
        "number of trials": (len({run.data.tags[TRIAL] for run in trials}), len(trials)),
    }
    for run in runs:
        end = run.info.status, run.data.tags.get(OUTCOME)
        found[f"end of {run.info.run_name}"] = end, ("FINISHED", "finished")
    for run in trials:
        evaluated = sorted({*range(every, STEPS + 1, every), STEPS})
        for name, steps in (("train/loss", list(range(1, STEPS + 1))), ("eval/loss", evaluated)):
            logged = sorted(metric.step for metric in client.get_metric_history(run.info.run_id, name))
            found[f"steps of {name} of {run.info.run_name}"] = logged, steps
    faults = [f"{what}: {value}, not {expected}" for what, (value, expected) in found.items() if value != expected]
    [sweep] = (Path(settings.resources.storage) / SWEEPS).glob("*/")
    try:
        for folder in {file.parent for file in sweep.glob("trials/*/samples_0.jsonl")}:
            learned_samples(folder)
    except AssertionError as error:
        faults.append(f"{folder}: {error}")
    return faults


def sweep_settings(storage: str | Path, trials: int) -> Settings:
    """Settings of a sweep of learning rates, with 38 steps per trial."""
    rates = [1e-3 * (1 + number / 8) for number in range(trials)]
    return load_settings(
        overrides={
            **SMALL,
            **LONGER,
            "resources.storage": str(storage),
            "tune.space": {"optim.lr": {"grid": rates}},
            "tune.scheduler": "none",
            "resources.max_failures": 10,
        }
    )


def main() -> None:
    """Run the sweep and print the faults; exit with status 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="trials of the sweep (8)")
    parser.add_argument("--kills", type=int, default=5, help="kills (5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of kinds and moments (0)")
    arguments = parser.parse_args()
    storage = tempfile.mkdtemp(prefix="sweep_kills_")
    print(f"storage: {storage}", flush=True)
    settings = sweep_settings(storage, arguments.trials)
    started = time.monotonic()
    draw = random.Random(arguments.seed)
    arrived = sweep_with_kills(settings, draw, arguments.kills, lambda line: print(line, flush=True))
    faults = find_faults(settings)
    extra = count_sweep_batches(settings) - arguments.trials * STEPS
    print(f"{arrived} kills, {time.monotonic() - started:.0f} s, {extra} batches repeated; faults: {faults or 'none'}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
