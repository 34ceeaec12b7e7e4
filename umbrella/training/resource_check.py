"""How many trainings fit on a cluster, checked before anything starts: Ray itself would wait without a word."""

from collections.abc import Sequence
from typing import Any

from umbrella.base import UserError
from umbrella.training.settings import ResourceSettings

SPARE_CPUS = 1.0
"""CPUs that stay free beside the workers. Ray Train and Ray Data place helpers that ask for one CPU to be placed and
none to run; where less is free, they and the trainings wait for ever."""


def max_concurrent_trainings(
    resources: ResourceSettings, available: dict[str, float], nodes: Sequence[dict[str, Any]] = ()
) -> int:
    """Count the trainings that run at once on a cluster, by their reservations and with no more workers than CPUs.

    Args:
        available: CPUs and GPUs of the whole cluster, as ``ray.cluster_resources()`` gives them.
        nodes: as ``ray.nodes()`` gives them; each worker has to fit on one. Empty: not looked at.

    Raises:
        UserError: not even one fits; says what is short.
    """
    check_resources(resources, resources.least_workers, "resources.workers", available, nodes)
    have_cpus, have_gpus = available.get("CPU", 0), available.get("GPU", 0)
    # Beside each other, trainings have all the workers that they may have.
    by_cpu = min(
        (have_cpus - SPARE_CPUS) / (resources.workers * resources.cpus_per_worker), have_cpus / resources.workers
    )
    gpus = resources.workers * resources.gpus_per_worker
    return max(1, int(min(by_cpu, have_gpus / gpus if gpus else by_cpu)))


def check_resources(
    resources: ResourceSettings,
    workers: int,
    setting: str,
    available: dict[str, float],
    nodes: Sequence[dict[str, Any]] = (),
) -> None:
    """Check that a cluster is large enough for so many workers.

    Args:
        setting: the setting that says how many workers there are.
        available, nodes: as in ``max_concurrent_trainings``.

    Raises:
        UserError: it is not; says what is short.
    """
    each = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    for kind, name, spare in (("CPU", "cpus_per_worker", SPARE_CPUS), ("GPU", "gpus_per_worker", 0.0)):
        needed, have = workers * each[kind] + spare, available.get(kind, 0)
        if needed > have:
            helpers = f" and {spare:g} for Ray's helpers" if spare else ""
            raise UserError(
                f"resources: {workers} workers of {each[kind]:g} {kind}s{helpers} need {needed:g} {kind}s, and Ray has"
                f" {have:g}; lower resources.{name} or {setting}"
            )
    if nodes:
        room = sum(_workers_on_node(node["Resources"], each) for node in nodes if node["Alive"])
        if room < workers:
            raise UserError(
                f"resources: {workers} workers of {each['CPU']:g} CPUs and {each['GPU']:g} GPUs, each on one node, and"
                f" the nodes have room for {room}; lower resources.cpus_per_worker, .gpus_per_worker or {setting}"
            )


def _workers_on_node(has: dict[str, float], each: dict[str, float]) -> int:
    """Count the workers that fit on a node."""
    return min((int(has.get(kind, 0) / amount + 1e-6) for kind, amount in each.items() if amount), default=0)
