"""A Ray of our own has processes that have imported what a training needs, and Ray Tune and Ray Train take those."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from integration.faults import plain_environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPT = """
    import json, os, sys, time
    from pathlib import Path
    import ray
    from ray import train, tune
    from ray.train.torch import TorchTrainer
    from umbrella.config import load_settings
    from umbrella.training.cluster import start_ray
    from umbrella.training.preload import TICKETS

    def found():
        environment = ray.get_runtime_context().get_runtime_env_string()
        return {"imported": "umbrella.training.worker" in sys.modules, "environment": json.loads(environment)}

    class Trial(tune.Trainable):
        def setup(self, config):
            self.found = found()

        def step(self):
            return {"found": self.found, "done": True}

    settings = load_settings(overrides={"resources.storage": sys.argv[1]})
    start_ray(settings.resources, log_to_driver=False, preloaded=2)
    (trial,) = tune.Tuner(
        tune.with_resources(Trial, {"CPU": 0.5}), run_config=tune.RunConfig(storage_path=sys.argv[1], verbose=0)
    ).fit()
    trained = TorchTrainer(
        lambda: found(),
        scaling_config=train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
        run_config=train.RunConfig(storage_path=sys.argv[1]),
    ).fit()
    left = os.listdir(os.environ[TICKETS])
    print(json.dumps({"trial": trial.metrics["found"], "worker": trained.return_value, "left": left}))
"""


def test_trials_and_workers_take_processes_that_are_there(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    said = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env=plain_environment(),
        timeout=300,
    )
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout.splitlines()[-1])
    assert found["trial"] == {"imported": True, "environment": {}}
    assert found["worker"]["environment"] == {}, "it gets a new process"
    assert found["left"] == [], "no process came for the ticket"


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
