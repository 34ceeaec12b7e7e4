"""A Ray of our own has processes that have imported what a training needs, and Ray Tune and Ray Train take those."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from integration.faults import plain_environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]

START = """
    import json, os, sys, time
    from pathlib import Path
    import ray
    from ray import train, tune
    from ray.train.torch import TorchTrainer
    from umbrella.config import load_settings
    from umbrella.training.cluster import start_ray
    from umbrella.training.preload import TICKETS

    def found(*unused):
        environment = ray.get_runtime_context().get_runtime_env_string()
        return {"imported": "umbrella.training.worker" in sys.modules, "environment": json.loads(environment)}

    settings = load_settings(overrides={"resources.storage": sys.argv[1]})
    start_ray(settings.resources, log_to_driver=False, preloaded=int(sys.argv[2]))
"""
TRIALS = """
    class Trial(tune.Trainable):
        def step(self):
            return {"found": found(), "done": True}

    logs, until = Path(ray._private.worker._global_node.get_logs_dir_path()), time.monotonic() + 120
    def begun():
        return len(list(logs.glob("python-core-worker-*")))
    while (os.listdir(os.environ[TICKETS]) or begun() < int(sys.argv[2])) and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(5)  # idle processes are ended after one second, unless Ray is told to keep them
    begun = begun()
    trials = tune.Tuner(
        tune.with_resources(Trial, {"CPU": 0.5}),
        tune_config=tune.TuneConfig(num_samples=int(sys.argv[2])),
        run_config=tune.RunConfig(storage_path=sys.argv[1], verbose=0),
    ).fit()
    seen = [trial.metrics["found"] for trial in trials]
    print(json.dumps({"trials": seen, "left": os.listdir(os.environ[TICKETS]), "begun": begun}))
"""
WORKER = """
    trained = TorchTrainer(
        found,
        scaling_config=train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
        run_config=train.RunConfig(storage_path=sys.argv[1]),
    ).fit()
    print(json.dumps(trained.return_value))
"""


def last_line(script: str, folder: Path, processes: int) -> dict:
    """What a script says at last that has so many processes import."""
    file = folder / "script.py"
    file.write_text(textwrap.dedent(START) + textwrap.dedent(script), encoding="utf-8")
    said = subprocess.run(
        [sys.executable, str(file), str(folder), str(processes)],
        capture_output=True, text=True, env=plain_environment(), timeout=300,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout.splitlines()[-1])


@pytest.mark.parametrize("processes", [1, 2])
def test_trials_take_the_processes_that_have_imported(tmp_path: Path, processes: int) -> None:
    found = last_line(TRIALS, tmp_path, processes)
    assert found["trials"] == [{"imported": True, "environment": {}}] * processes
    assert found["left"] == [], "no process came for the ticket"
    assert found["begun"] == processes, "which of several comes first to a trial is chance"


def test_a_worker_brings_no_environment_for_which_ray_would_start_a_process(tmp_path: Path) -> None:
    assert last_line(WORKER, tmp_path, 2)["environment"] == {}


LOOK = """
    import torch

    asked = []
    for name in ("is_available", "device_count", "current_device", "get_device_capability", "_lazy_init", "init"):
        setattr(torch.cuda, name, lambda *rest, name=name: asked.append(name))
    import umbrella.training.worker
    print(asked)
"""


def test_what_is_imported_before_ray_says_which_gpus_are_for_it_asks_for_none() -> None:
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(LOOK)], capture_output=True, text=True, timeout=120)
    assert said.stdout == "[]\n", said.stderr
