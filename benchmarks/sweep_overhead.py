"""Overhead of a sweep: K sequential trials, compared with the same trainings without Ray Tune.

    python benchmarks/sweep_overhead.py [trials=4] [rounds=3] [any setting=...]

The trainings are those of the default question on the phantom cohort, as many as it has trials. Bare means: in this
process, which has imported everything, each from an empty folder to its last checkpoint, with MLflow, its reports and
Ray Data, but without Ray Tune and without a process of its own. Sweep and single training are the scripts that people
run, in processes and a Ray of their own. A sweep's time is that of its parent run in MLflow: Ray is there, what follows
is processes, imports, all trials, what Ray Tune does between them, and the report. A script's is all of it, with the
start of Ray.

Each round takes all bare trainings, one by `train.py`, and one sweep; every second round takes the scripts first, so
that a machine that gets slower or warmer counts for both. One bare training comes before. Sums and ratios are of one
round; what is said at the end is the median over rounds, with the least and the most.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

SCRIPTS = Path(__file__).resolve().parent.parent / "experiments"


def main(words: list[str]) -> None:
    """Measure and print."""
    os.environ["OMP_NUM_THREADS"] = "1"  # as Ray sets it where a worker has half a CPU
    import ray
    from mlflow import MlflowClient

    from umbrella.cluster import start_ray
    from umbrella.config import load_settings
    from umbrella.data.ingest import load_splits
    from umbrella.tracking.store import open_experiment, tracking_uri
    from umbrella.training.launch import run_job
    from umbrella.training.run import make_job
    from umbrella.tuning.results import read_trials

    given = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}
    trials, rounds = int(given.pop("trials", 4)), int(given.pop("rounds", 3))
    storage = Path(tempfile.mkdtemp(prefix="sweep_overhead_"))
    rates = [7e-4 * (1 + number / 100) for number in range(trials)]
    fixed = {"resources.storage": str(storage), "tracking.model": False, "evaluate.at_end": False} | given
    settings = load_settings(overrides=fixed)
    splits = load_splits(settings, lambda things, what: things)
    uri = tracking_uri(storage)
    tracking: dict[str, str | None] = {"uri": uri, "experiment": open_experiment(uri, settings.experiment, storage)}
    client = MlflowClient(uri)

    def bare(name: str, rates: Sequence[float]) -> list[float]:
        start_ray(settings.resources, log_to_driver=False)
        spans = []
        for number, rate in enumerate(rates):
            own = {**tracking, "name": f"{name}-{number}", "trial": f"{name}-{number}"}
            job = make_job(settings.with_values({"optim.lr": rate}), splits, own, f"{storage}/{name}-{number}")
            begun = time.time()
            run_job(replace(job, start_time=begun), in_process=True)
            spans.append(time.time() - begun)
        ray.shutdown()
        return spans

    def script(file: str, **more: Any) -> float:
        words = [
            f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in (fixed | more).items()
        ]
        words = [word.removesuffix("...").strip() for word in words]
        begun = time.time()
        subprocess.run([sys.executable, str(SCRIPTS / file), *words], check=True, stdout=subprocess.DEVNULL)
        return time.time() - begun

    def swept(name: str) -> dict[str, Any]:
        question = {"optim.lr": {"grid": rates}, "mask.supervise": None}
        space = {f"tune.space.{setting}": values for setting, values in question.items()}
        whole = script("tune.py", name=name, **space, **{"tune.scheduler": "none", "tune.concurrent": 1})
        runs = client.search_runs([str(tracking["experiment"])], f"attributes.run_name = '{name}'")
        begun, ended = runs[0].info.start_time / 1000, runs[0].info.end_time / 1000
        done = sorted(read_trials(storage / "sweeps" / name, settings.tune), key=lambda trial: trial.started or 0.0)
        starts = [trial.started or 0.0 for trial in done]
        ends = [start + (trial.seconds or 0.0) for start, trial in zip(starts, done, strict=True)]
        return {
            "within the sweep, s": [trial.seconds or 0.0 for trial in done],
            "sweep, s": ended - begun,
            "before the first trial, s": starts[0] - begun,
            "between two trials, s": [later - end for later, end in zip(starts[1:], ends[:-1], strict=True)],
            "after the last evaluation, s": ended - ends[-1],
            "all of tune.py, s": whole,
        }

    warm = bare("warm", rates[:1])
    table: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        row: dict[str, Any] = {}
        for what in ("bare", "scripts") if number % 2 else ("scripts", "bare"):
            if what == "bare":
                row["bare, s"] = bare(f"bare-{number}", rates)
            else:
                row["all of train.py, s"] = script("train.py", name=f"alone-{number}", **{"optim.lr": rates[0]})
                row |= swept(f"sweep-{number}")
        alone = sum(row["bare, s"])
        row["sweep / bare"] = row["sweep, s"] / alone
        row["extra per trial, s"] = (row["sweep, s"] - alone) / trials
        row["tune.py / as many train.py"] = row["all of tune.py, s"] / (trials * row["all of train.py, s"])
        table.append(row)
        print(json.dumps({"round": number} | _rounded(row)), flush=True)
    lists = [name for name, value in table[0].items() if isinstance(value, list)]
    of_all = {name: _middle([v for row in table for v in row[name]]) for name in lists}
    of_all |= {name: _middle([row[name] for row in table]) for name in table[0] if name not in lists}
    summary = {
        "trials": trials,
        "rounds": rounds,
        "the first of all, s": round(warm[0], 1),
        "median [least, most]": of_all,
    }
    print(json.dumps(summary, indent=1))


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: [round(v, 2) for v in x] if isinstance(x, list) else round(x, 3) for k, x in row.items()}


def _middle(values: Sequence[float]) -> str:
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]" if values else "none"


if __name__ == "__main__":
    main(sys.argv[1:])
