"""Kills trainings at random, again and again, and says whether each ended as one that nothing happened to.

python -m tests.faults.random_kills [--kills 20] [--seed 0]

Each training meets up to three kills, each at a random step: SIGKILL to its workers, SIGKILL to the script, or SIGTERM
to it; where the script ends, the same command is given again. At the end the losses and the samples must be those of
the training that was left alone, to the bit. The seed of each training is printed: `--kills 3 --seed N` repeats it.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tests.conftest import SMALL
from tests.faults.fault_injection import LONGER, STEPS, TRAIN, folder_of, kill_workers, left_by, plain_environment
from umbrella.config import Settings, load_settings

KINDS: dict[str, Callable[[subprocess.Popen], int | None]] = {
    "SIGKILL to the workers": lambda script: kill_workers(script.pid),
    "SIGKILL to the script": lambda script: script.kill(),
    "SIGTERM to the script": lambda script: script.terminate(),
}
ENDS = {0: "it ended", -9: "killed", 143: "saved and stopped"}


def start(settings: Settings) -> subprocess.Popen:
    """The command of a training, given."""
    file = folder_of(settings).with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(settings.to_yaml(), encoding="utf-8")
    with file.with_suffix(".txt").open("a") as said:
        return subprocess.Popen([sys.executable, TRAIN, file], stdout=said, stderr=said, env=plain_environment())


def logged(settings: Settings, what: str) -> int:
    """How often the training's worker has taken a batch ("position"), again or not, or has begun ("start")."""
    log = folder_of(settings) / "samples_0.jsonl"
    return log.read_text(encoding="utf-8").count(f'"{what}"') if log.exists() else 0


def train_with_kills(settings: Settings, draw: random.Random, kills: int) -> int:
    """A training to its end, killed up to so many times on the way; returns how many kills arrived.

    Raises:
        RuntimeError: the script ended as it should not.
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
    """Kill until there were enough; exit status 1 if a training ended otherwise than it should have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills in all (20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first training; the next ones count up (0)")
    asked = parser.parse_args()
    storage = tempfile.mkdtemp(prefix="random_kills_")
    print(f"everything is kept in {storage}", flush=True)

    def named(name: str) -> Settings:
        return load_settings(overrides={**SMALL, **LONGER, "resources.storage": storage, "name": name})

    alone = named("alone")
    if start(alone).wait(200):
        sys.exit(f"the training that is left alone failed; see {folder_of(alone).with_suffix('.txt')}")
    expected = left_by(alone, folder_of(alone))
    arrived, trainings, failed, seed = 0, 0, [], asked.seed
    while arrived < asked.kills:
        settings = named(f"seed-{seed}")
        print(f"seed {seed}", flush=True)
        try:
            arrived += train_with_kills(settings, random.Random(seed), min(3, asked.kills - arrived))
            if left_by(settings, folder_of(settings)) != expected:
                raise RuntimeError("losses or samples differ from those of the training that was left alone")
        except (RuntimeError, AssertionError, subprocess.TimeoutExpired) as error:
            failed.append(seed)
            print(f"  FAILED: {error}", flush=True)
        trainings, seed = trainings + 1, seed + 1
    print(f"{arrived} kills in {trainings} trainings: {len(failed)} failed" + (f", seeds {failed}" if failed else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
