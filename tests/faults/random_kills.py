"""Kill trainings at random steps, and compare each with a training that was not killed.

python -m tests.faults.random_kills [--kills 20] [--seed 0]

Each training gets up to three kills, each at a random step: SIGKILL to its workers, SIGKILL to the script, or SIGTERM
to it. If the script ends, the same command is started again. At the end the losses and samples must equal those of the
uninterrupted training bit for bit. The seed of each training is printed: `--kills 3 --seed N` repeats it.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tests.conftest import SMALL
from tests.faults.fault_injection import (
    LONGER,
    STEPS,
    TRAIN,
    environment_without_ray,
    folder_of,
    kill_workers,
    losses_and_samples,
)
from umbrella.config import Settings, load_settings

KINDS: dict[str, Callable[[subprocess.Popen], int | None]] = {
    "SIGKILL to the workers": lambda script: kill_workers(script.pid),
    "SIGKILL to the script": lambda script: script.kill(),
    "SIGTERM to the script": lambda script: script.terminate(),
}
ENDS = {0: "it ended", -9: "killed", 143: "saved and stopped"}


def start(settings: Settings) -> subprocess.Popen:
    """Start the training script."""
    file = folder_of(settings).with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(settings.to_yaml(), encoding="utf-8")
    with file.with_suffix(".txt").open("a") as said:
        return subprocess.Popen([sys.executable, TRAIN, file], stdout=said, stderr=said, env=environment_without_ray())


def logged(settings: Settings, what: str) -> int:
    """Count the entries of a kind in the sample log: batches ("position", with repeated ones) or starts ("start")."""
    log = folder_of(settings) / "samples_0.jsonl"
    return log.read_text(encoding="utf-8").count(f'"{what}"') if log.exists() else 0


def train_with_kills(settings: Settings, draw: random.Random, kills: int) -> int:
    """Train to the end with up to ``kills`` kills, and return the number of kills.

    Raises:
        RuntimeError: the script ended with an unexpected status.
    """
    arrived, script, begun = 0, start(settings), 0
    for _ in range(kills):
        kind, wait = draw.choice(list(KINDS)), draw.randint(1, STEPS // 3)
        # A worker that outlives its killed script for a moment still logs: its batches are not the next script's.
        while script.poll() is None and logged(settings, "start") == begun:
            time.sleep(0.005)
        begun, until = logged(settings, "start"), logged(settings, "position") + wait
        while script.poll() is None and logged(settings, "position") < until:
            time.sleep(0.005)
        if script.poll() is not None:
            break
        if KINDS[kind](script) == 0:
            break  # no worker is left: it has just ended
        arrived += 1
        print(f"  {kind}, {wait} batches on: ", end="", flush=True)
        if kind == "SIGKILL to the workers":
            print("started again by Ray", flush=True)
            continue
        status = script.wait(120)
        print(ENDS.get(status, f"status {status}"), flush=True)
        if status == 0:
            return arrived
        script = start(settings)
    status = script.wait(120)
    if status:
        raise RuntimeError(f"the script ended with status {status}; see {folder_of(settings).with_suffix('.txt')}")
    return arrived


def main() -> None:
    """Run trainings until the number of kills is reached. The exit status is 1 if a training differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills in all (20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first training; the next ones count up (0)")
    asked = parser.parse_args()
    storage = tempfile.mkdtemp(prefix="random_kills_")
    print(f"all files are in {storage}", flush=True)

    def make_settings(name: str) -> Settings:
        return load_settings(overrides={**SMALL, **LONGER, "resources.storage": storage, "name": name})

    alone = make_settings("alone")
    if start(alone).wait(200):
        sys.exit(f"the uninterrupted training failed; see {folder_of(alone).with_suffix('.txt')}")
    expected = losses_and_samples(alone, folder_of(alone))
    arrived, trainings, failed, seed = 0, 0, [], asked.seed
    while arrived < asked.kills:
        settings = make_settings(f"seed-{seed}")
        print(f"seed {seed}", flush=True)
        try:
            arrived += train_with_kills(settings, random.Random(seed), min(3, asked.kills - arrived))
            if losses_and_samples(settings, folder_of(settings)) != expected:
                raise RuntimeError("losses or samples differ from those of the uninterrupted training")
        except (RuntimeError, AssertionError, subprocess.TimeoutExpired) as error:
            failed.append(seed)
            print(f"  FAILED: {error}", flush=True)
        trainings, seed = trainings + 1, seed + 1
    print(f"{arrived} kills in {trainings} trainings: {len(failed)} failed" + (f", seeds {failed}" if failed else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
