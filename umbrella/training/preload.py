"""Processes that have imported what a training needs before it asks for them.

A Ray of our own starts processes with itself, and gives them to actors that want no environment of their own. Importing
takes a training's process 6 s on two cores, and 17 s were seen on a GPU host. Here it goes on while the script itself
still imports and reads.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from ray._private import services

from umbrella.importing import importing

TICKETS = "UMBRELLA_PRELOAD"
"""Names the folder that holds a file for each process that is to import. Later ones may be for something else."""
MOST = 8
"""How many import at once. Each takes 430 MB then, and sixteen read the disk against each other."""
MODULES = (
    "umbrella.training.worker",
    "ray.data._internal.execution.streaming_executor",
    "ray.data._internal.planner.planner",
    "mlflow.store.tracking.sqlalchemy_store",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
)
"""What a training imports, and what Ray Data, MLflow and the first evaluation import within it."""
KEPT = "600000"
"""Milliseconds that they stay without work: a second unless told otherwise, after which one of them sometimes went."""
FIRST = "--num_prestart_python_workers"
"""Ray's own option: how many processes it begins with. Its choice is one per CPU."""
_kept: list[tempfile.TemporaryDirectory[str]] = []


@contextmanager
def prepared(processes: int) -> Iterator[None]:
    """Let the Ray that is started in here begin with so many processes, all of which import.

    With no others, since which of them comes first to be given away is chance. No more than it has CPUs: they would
    wait for each other.
    """
    processes = min(processes, MOST)
    folder = tempfile.TemporaryDirectory(prefix="umbrella_preload_")
    _kept.append(folder)
    for number in range(processes):
        (Path(folder.name) / str(number)).touch()
    os.environ[TICKETS] = folder.name
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", KEPT)
    os.environ["RAY_preload_python_modules"] = "umbrella.training.preloaded"  # noqa: SIM112  # Ray's own name
    start = services.start_ray_process

    def start_with_fewer(command: Sequence[str], *rest: Any, **more: Any) -> Any:
        command = [f"{FIRST}={processes}" if str(word).startswith(FIRST) else word for word in command]
        return start(command, *rest, **more)

    with mock.patch.object(services, "start_ray_process", start_with_fewer):
        yield
    want_no_environment()


def take() -> None:
    """Import, if there is a ticket left for this process."""
    if TICKETS not in os.environ:
        return
    for ticket in Path(os.environ[TICKETS]).glob("*"):
        try:
            ticket.unlink()
        except FileNotFoundError:  # another process was faster
            continue
        with importing():
            for module in MODULES:
                import_module(module)
            import_module("umbrella.tracking.environment").environment_json()  # once in a process
            want_no_environment()
        return


def want_no_environment() -> None:
    """Let the actors of Ray Tune and Ray Train inherit the script's variables, as every process of its Ray does.

    Each would bring the very same ones as an environment of its own, and Ray would start a new process for it.
    """
    from ray.train.v2._internal import constants
    from ray.train.v2.api import data_parallel_trainer
    from ray.tune.execution import class_cache

    for names in (constants.ENV_VARS_TO_PROPAGATE, class_cache.ENV_VARS_TO_PROPAGATE, class_cache.DEFAULT_ENV_VARS):
        names.clear()
    data_parallel_trainer.get_env_vars_to_propagate = Inherited


class Inherited(dict[str, str]):
    """Variables that need not be set."""

    def setdefault(self, key: str, default: str = "") -> str:
        """Ray Train adds one here, which ``cluster.ENVIRONMENT`` has."""
        return os.environ.get(key, default)
