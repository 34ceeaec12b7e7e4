"""What a training waits for, where the cluster has no room for it: said, instead of hanging without a word."""

import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import ray

from umbrella.training.room import SPARE_CPUS
from umbrella.training.settings import ResourceSettings

LOOK, PATIENCE, AGAIN = 5.0, 30.0, 300.0
"""Seconds between two looks, before the first word, and between two words."""
WORKERS = ("RayTrainWorker", "Trial")
"""Classes of the actors that train, as Ray knows them: workers, and the trials that train in their own process."""
Nodes = dict[str, dict[str, float]]


class Waiting:
    """While in here, says on standard error when nothing of this process's trains and the cluster has no room.

    Args:
        here: trials train in their own process, see ``ResourceSettings.alone``.
    """

    def __init__(self, resources: ResourceSettings, here: bool = False) -> None:
        self.resources, self.actors = resources, WORKERS if here else WORKERS[:1]
        self.asked = False
        """Whether the training was asked to stop. If nothing of it runs then, this process gets a second SIGTERM."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Waiting":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._ended.set()
        self._thread.join(LOOK)

    def _follow(self) -> None:
        since, said, idle = time.monotonic(), -AGAIN, 0
        while not self._ended.wait(LOOK):
            words = ""
            with suppress(Exception):  # Ray is busy, or gone: nothing that a training should end for
                actors = own_actors()
                words = self._look(actors)
                idle = idle + 1 if self.asked and not train(self.actors, actors) else 0
            if idle == 2:  # at one look only, the workers may just have stopped
                self.asked = False
                signal.raise_signal(signal.SIGTERM)
            now = time.monotonic()
            if not words:
                since = now
            elif now - since >= PATIENCE and now - said >= AGAIN:
                said = now
                print(f"waiting for {words}", file=sys.stderr, flush=True)

    def trains(self) -> bool:
        """Whether a process that trains is there, be it in the making."""
        return train(self.actors, own_actors())

    def _look(self, actors: list[dict[str, Any]]) -> str:
        state = ray._private.state
        free, have = state.available_resources_per_node(), state.total_resources_per_node()
        return missing(self.resources, self.actors, actors, free, have)


def own_actors() -> list[dict[str, Any]]:
    """The living actors of this process, as Ray describes them."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return [actor for actor in ray._private.state.actors(job_id=job).values() if actor["State"] != "DEAD"]


def train(classes: tuple[str, ...], actors: list[dict[str, Any]]) -> bool:
    """Whether one of the actors is of a class that trains. Ray makes such a one when it has a place."""
    return any(actor["ActorClassName"] in classes for actor in actors)


def missing(
    resources: ResourceSettings, classes: tuple[str, ...], actors: list[dict[str, Any]], free: Nodes, have: Nodes
) -> str:
    """What the trainings of a process wait for, in words; empty where they wait for nothing that a cluster could have.

    Args:
        classes: of the actors that train.
        actors: the process's own, as Ray describes them.
        free, have: what each node has, by its id.
    """
    in_all = f"{_amount(free)} free of {_amount(have)} on {len(have)} node{'s' if len(have) != 1 else ''}"
    if not train(classes, actors):
        least, most = resources.least_workers, resources.workers
        cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
        if _room(free.values(), cpus, gpus) >= least:
            return ""
        many = f"{least} to {most} workers" if least < most else f"{most} worker{'s' if most > 1 else ''}"
        each = " and ".join([_count(cpus, "CPU")] + ([_count(gpus, "GPU")] if gpus else []))
        return (
            f"resources: {many} of {each}, each on one node, and {SPARE_CPUS:g} CPU for Ray's helpers; {in_all},"
            f" room for {_room(free.values(), cpus, gpus)} (resources.workers, .cpus_per_worker, .gpus_per_worker)"
        )
    helpers = [a["ActorClassName"] for a in actors if a["State"] == "PENDING_CREATION"]
    helpers = sorted({name for name in helpers if name not in WORKERS})
    if helpers and all(node.get("CPU", 0) < SPARE_CPUS for node in free.values()):
        return (
            f"resources: {SPARE_CPUS:g} CPU on one node for Ray's helpers ({', '.join(helpers)}); {in_all}; lower"
            " resources.cpus_per_worker or .workers"
        )
    return ""


def _room(nodes: Any, cpus: float, gpus: float) -> int:
    """How many workers find a place."""
    return sum(
        int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) / gpus if gpus else float("inf")) + 1e-6)
        for node in nodes
    )


def _amount(nodes: Nodes) -> str:
    totals = {kind: sum(node.get(kind, 0) for node in nodes.values()) for kind in ("CPU", "GPU")}
    return " and ".join(_count(totals[kind], kind) for kind in totals)


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'s' if number != 1 else ''}"
