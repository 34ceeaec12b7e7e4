"""Kills a sweep at random, again and again, and says whether its runs are those of a sweep that was left alone.

python -m tests.faults.sweep_kills [--trials 8] [--kills 5] [--seed 0]

A kill is SIGKILL to the script, to the process of a trial, or to a training's workers, at a random moment; where the
script ends, `tune.py --resume last` is given. At the end MLflow must hold one finished run per trial, each with one
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

import psutil
from mlflow import MlflowClient

from tests.conftest import SMALL
from tests.faults.fault_injection import LONGER, STEPS, kill, kill_workers, named, plain_environment, samples, taken
from umbrella.config import Settings, load_settings
from umbrella.paths import SWEEPS
from umbrella.tracking.mlflow_logger import OUTCOME, PARENT, TRIAL
from umbrella.tracking.store import tracking_uri

TUNE = Path(__file__).resolve().parents[2] / "experiments" / "tune.py"


def kill_trial(script: subprocess.Popen, draw: random.Random) -> int:
    """SIGKILL to one process that a trial runs in; returns how many were killed."""
    trials = [p for p in psutil.Process(script.pid).children(recursive=True) if "ray::ImplicitFunc." in named(p)]
    return kill(trials and [draw.choice(trials)])


KINDS: dict[str, Callable[[subprocess.Popen, random.Random], int]] = {
    "SIGKILL to the script": lambda script, draw: script.kill() or 1,
    "SIGKILL to a trial": kill_trial,
    "SIGKILL to the workers": lambda script, draw: kill_workers(script.pid),
}


def start(settings: Settings, go_on: bool) -> subprocess.Popen:
    """The command of the sweep, given."""
    storage = Path(settings.resources.storage)
    file, said = storage / "question.yaml", storage / "said.txt"
    file.write_text(settings.to_yaml(), encoding="utf-8")
    words = ["--resume", "last", f"resources.storage={storage}"] if go_on else [str(file)]
    with said.open("a") as out:
        return subprocess.Popen([sys.executable, TUNE, *words], stdout=out, stderr=out, env=plain_environment())


def batches_taken(settings: Settings) -> int:
    """How many batches all trials have taken so far."""
    return sum(taken(trial) for trial in Path(settings.resources.storage).glob("sweeps/*/trials/*/"))


def sweep_with_kills(settings: Settings, draw: random.Random, kills: int, say: Callable[[str], None]) -> int:
    """Run a sweep to its end, killed so many times on the way; returns how many kills arrived.

    Raises:
        RuntimeError: the script ended as it should not.
    """
    script, arrived, trials = start(settings, go_on=False), 0, len(settings.tune.space["optim.lr"]["grid"])
    wait = trials * STEPS // (kills + 2)
    while arrived < kills:
        until = batches_taken(settings) + draw.randint(1, wait)
        while script.poll() is None and batches_taken(settings) < until:
            time.sleep(0.05)
        if script.poll() is not None:
            break
        kind = draw.choice(list(KINDS))
        if not KINDS[kind](script, draw):
            continue
        arrived += 1
        say(f"{kind}, {until} batches in")
        if kind == "SIGKILL to the script":
            script.wait()
            script = start(settings, go_on=True)
    status = script.wait(900)
    if status:
        raise RuntimeError(f"the script ended with status {status}; see {settings.resources.storage}/said.txt")
    return arrived


def faults_in(settings: Settings) -> list[str]:
    """What is not as it should be with the sweep's runs in MLflow."""
    client = MlflowClient(tracking_uri(settings.resources.storage))
    runs = client.search_runs([client.get_experiment_by_name(settings.experiment).experiment_id])
    parents = [run for run in runs if PARENT not in run.data.tags]
    children = [run for run in runs if PARENT in run.data.tags]
    grid = settings.tune.space["optim.lr"]["grid"]
    faults = [f"{len(parents)} parents"] * (len(parents) != 1) + [f"{len(children)} runs"] * (
        len(children) != len(grid)
    )
    if {float(run.data.params["optim.lr"]) for run in children} != {float(value) for value in grid}:
        faults.append("the runs are not one for each value")
    if len({run.data.tags[TRIAL] for run in children}) != len(children):
        faults.append("two runs of one trial")
    every = settings.train.evaluate_every
    expected = {
        "train/loss": list(range(1, STEPS + 1)),
        "eval/loss": sorted({*range(every, STEPS + 1, every), STEPS}),
    }
    for run in [*parents, *children]:
        if (run.info.status, run.data.tags[OUTCOME]) != ("FINISHED", "finished"):
            faults.append(f"{run.info.run_name} is {run.info.status}, {run.data.tags.get(OUTCOME)}")
    for run in children:
        for name, steps in expected.items():
            found = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
            if sorted(found) != steps:
                faults.append(f"{run.info.run_name}: {name} has steps {found}")
    [sweep] = (Path(settings.resources.storage) / SWEEPS).glob("*/")
    try:
        for folder in {file.parent for file in sweep.glob("trials/*/samples_0.jsonl")}:
            samples(folder)
    except AssertionError as error:
        faults.append(f"{folder}: {error}")
    return faults


def question(storage: str | Path, trials: int) -> Settings:
    """So many rates, to be tried for 39 steps each."""
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
    """Exit status 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="trials of the sweep (8)")
    parser.add_argument("--kills", type=int, default=5, help="kills (5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of kinds and moments (0)")
    asked = parser.parse_args()
    storage = tempfile.mkdtemp(prefix="sweep_kills_")
    print(f"everything is kept in {storage}", flush=True)
    settings = question(storage, asked.trials)
    began = time.monotonic()
    arrived = sweep_with_kills(settings, random.Random(asked.seed), asked.kills, lambda what: print(what, flush=True))
    faults = faults_in(settings)
    extra = batches_taken(settings) - asked.trials * STEPS
    print(f"{arrived} kills, {time.monotonic() - began:.0f} s, {extra} batches taken again: {faults or 'all is well'}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
