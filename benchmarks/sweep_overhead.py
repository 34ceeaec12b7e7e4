"""What a sweep adds to its trainings: K trials one after the other, beside the same trainings without Ray Tune.

    python benchmarks/sweep_overhead.py [trials=4] [any setting=...]

The trainings are those of the default question on the phantom cohort. Alone, they run one after the other in a process
that has imported everything, and only their own time counts; two of them also as `train.py` runs them, in processes of
Ray Train's. In the sweep everything counts from Ray Tune's start to its end: processes, imports, what Ray Tune does
between trials.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml


def main(words: list[str]) -> None:
    """Measure and print."""
    os.environ["OMP_NUM_THREADS"] = "1"  # as Ray sets it where a worker has half a CPU
    from umbrella.config import load_settings
    from umbrella.data.intake import load_splits
    from umbrella.tracking.store import open_experiment, tracking_uri
    from umbrella.training.job import run_job
    from umbrella.training.run import make_job, start_ray
    from umbrella.tuning import sweep
    from umbrella.tuning.results import read_trials

    given = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}
    trials = int(given.pop("trials", 4))
    storage = Path(tempfile.mkdtemp(prefix="sweep_overhead_"))
    rates = [3e-3 * (1 + number / 100) for number in range(trials)]
    settings = load_settings(
        overrides={
            "resources.storage": str(storage),
            "tune.space": {"optim.lr": {"grid": rates}},
            "tune.scheduler": "none",
            "tune.concurrent": 1,
            "tracking.model": False,
        }
        | given
    )
    start_ray(settings.resources, log_to_driver=False)
    splits = load_splits(settings, lambda things, what: things)
    uri = tracking_uri(storage)
    told: dict[str, str | None] = {"uri": uri, "experiment": open_experiment(uri, settings.experiment, storage)}

    def train(name: str, rate: float, here: bool = True, **more: Any) -> float:
        chosen = settings.with_values({"optim.lr": rate, **more})
        folder = storage / "alone" / name
        job = make_job(chosen, splits, {**told, "name": name, "trial": name}, str(folder))
        begun = time.time()
        run_job(replace(job, begun=begun), here)
        return time.time() - begun

    train("imports", 1e-3, **{"train.epochs": 1})
    alone = [train(f"{number}", rate) for number, rate in enumerate(rates)]
    started = [train(f"started-{number}", rate, here=False) for number, rate in enumerate(rates[:2])]
    spans: list[float] = []
    make = sweep._tuner

    class Timed:
        def __init__(self, tuner: Any) -> None:
            self.tuner = tuner

        def fit(self) -> Any:
            begun = time.time()
            results = self.tuner.fit()
            spans.append(time.time() - begun)
            return results

    sweep._tuner = lambda *arguments: Timed(make(*arguments))  # type: ignore[assignment]
    answer = sweep.run_sweep(settings, frozenset(), lambda things, what: things)
    within = [trial.seconds or 0.0 for trial in read_trials(answer.folder, settings.tune)]
    print(
        json.dumps(
            {
                "trials": trials,
                "seconds of each training alone": [round(value, 1) for value in alone],
                "two of them, with processes of Ray Train's": [round(value, 1) for value in started],
                "the same within the sweep, from its own start": [round(value, 1) for value in within],
                "seconds of the sweep": round(spans[0], 1),
                "the sweep to the trainings alone": round(spans[0] / sum(alone), 3),
                "the sweep to as many with processes of Ray Train's": round(
                    spans[0] / (sum(started) / len(started) * trials), 3
                ),
                "seconds that a trial costs more than its training alone": round((spans[0] - sum(alone)) / trials, 1),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
