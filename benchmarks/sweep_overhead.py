"""What a sweep adds to its trainings: K trials one after the other, beside the same trainings without Ray Tune.

    python benchmarks/sweep_overhead.py [trials=4] [rounds=3] [any setting=...]

The trainings are those of the default question on the phantom cohort. Bare means: in this process, which has imported
everything, each from an empty folder to its last checkpoint, with MLflow, its reports and Ray Data, but without Ray
Tune and without a process of its own. A training as `train.py` runs it has processes of Ray Train's. The sweep is timed
as a whole, around `Tuner.fit()`: processes, imports, what Ray Tune does between trials, its end.

Each round takes all bare trainings, one as `train.py` runs it, and one sweep; every second round takes the sweep first,
so that a machine that gets slower or warmer counts for both. One bare training and a sweep of one trial come before,
and are reported by themselves. Sums and ratios are of one round; what is said at the end is the median over rounds,
with the least and the most.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml


def main(words: list[str]) -> None:
    """Measure and print."""
    os.environ["OMP_NUM_THREADS"] = "1"  # as Ray sets it where a worker has half a CPU
    from umbrella.config import load_settings
    from umbrella.data.intake import load_splits
    from umbrella.tracking.store import open_experiment, tracking_uri
    from umbrella.training.cluster import start_ray
    from umbrella.training.job import run_job
    from umbrella.training.run import make_job
    from umbrella.tuning import sweep
    from umbrella.tuning.results import Trial, read_trials

    given = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}
    trials, rounds = int(given.pop("trials", 4)), int(given.pop("rounds", 3))
    storage = Path(tempfile.mkdtemp(prefix="sweep_overhead_"))
    rates = [3e-3 * (1 + number / 100) for number in range(trials)]
    fixed = {"resources.storage": str(storage), "tune.scheduler": "none", "tune.concurrent": 1, "tracking.model": False}
    settings = load_settings(overrides=fixed | given)
    start_ray(settings.resources, log_to_driver=False)
    splits = load_splits(settings, lambda things, what: things)
    uri = tracking_uri(storage)
    told: dict[str, str | None] = {"uri": uri, "experiment": open_experiment(uri, settings.experiment, storage)}
    spans: list[tuple[float, float]] = []
    make = sweep._tuner

    class Timed:
        def __init__(self, tuner: Any) -> None:
            self.tuner = tuner

        def fit(self) -> Any:
            begun = time.time()
            results = self.tuner.fit()
            spans.append((begun, time.time()))
            return results

    sweep._tuner = lambda *arguments: Timed(make(*arguments))  # type: ignore[assignment]

    def train(name: str, rate: float, here: bool = True) -> float:
        job = make_job(
            settings.with_values({"optim.lr": rate}), splits, {**told, "name": name, "trial": name}, f"{storage}/{name}"
        )
        begun = time.time()
        run_job(replace(job, begun=begun), here)
        return time.time() - begun

    def swept(name: str, values: Sequence[float]) -> tuple[tuple[float, float], list[Trial]]:
        asked = load_settings(
            overrides=fixed | given | {"name": name, "tune.space": {"optim.lr": {"grid": list(values)}}}
        )
        answer = sweep.run_sweep(asked, frozenset(), lambda things, what: things)
        return spans[-1], read_trials(answer.folder, asked.tune)

    warm = {"bare": round(train("bare-warm", 1e-3), 1)}
    (begun, ended), _ = swept("sweep-warm", [1e-3])
    warm["a sweep of one"] = round(ended - begun, 1)
    table: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        alone, started = list[float](), 0.0
        for what in ("bare", "sweep") if number % 2 else ("sweep", "bare"):
            if what == "bare":
                alone = [train(f"bare-{number}-{i}", rate) for i, rate in enumerate(rates)]
                started = train(f"started-{number}", rates[0], here=False)
            else:
                (begun, ended), done = swept(f"sweep-{number}", rates)
        starts = [trial.started or 0.0 for trial in done]
        ends = [(trial.started or 0.0) + (trial.seconds or 0.0) for trial in done]
        table.append(
            {
                "bare, s": alone,
                "within the sweep, s": [trial.seconds or 0.0 for trial in done],
                "sweep, s": ended - begun,
                "before the first trial, s": starts[0] - begun,
                "between two trials, s": [later - end for later, end in zip(starts[1:], ends[:-1], strict=True)],
                "after the last evaluation, s": ended - ends[-1],
                "as train.py runs one, s": started,
                "sweep / as many by train.py": (ended - begun) / (started * trials),
                "sweep / bare": (ended - begun) / sum(alone),
                "extra per trial, s": (ended - begun - sum(alone)) / trials,
            }
        )
        print(json.dumps({"round": number} | _rounded(table[-1])), flush=True)
    said = ("bare, s", "within the sweep, s", "between two trials, s")
    of_all = {name: _middle([v for row in table for v in row[name]]) for name in said}
    of_all |= {name: _middle([row[name] for row in table]) for name in table[0] if name not in said}
    print(
        json.dumps({"trials": trials, "rounds": rounds, "warm-up, s": warm, "median [least, most]": of_all}, indent=1)
    )


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: [round(v, 2) for v in x] if isinstance(x, list) else round(x, 3) for k, x in row.items()}


def _middle(values: Sequence[float]) -> str:
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]" if values else "none"


if __name__ == "__main__":
    main(sys.argv[1:])
