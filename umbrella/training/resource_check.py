"""Check before the start that a training fits on the cluster: Ray itself would wait for ever without a message."""

from collections.abc import Sequence
from typing import Any

from umbrella.base import UserError
from umbrella.training.settings import ResourceSettings

SPARE_CPUS = 1.0
"""CPUs that must stay free beside the workers. Ray Train and Ray Data place actors that need one free CPU to be placed
(and none to run); with less, they and the trainings wait for ever."""


def max_concurrent_trainings(
    resources: ResourceSettings, available: dict[str, float], nodes: Sequence[dict[str, Any]] = ()
) -> int:
    """Return the number of trainings that can run at the same time, with no more workers than CPUs.

    Args:
        available: CPUs and GPUs of the whole cluster, from ``ray.cluster_resources()``.
        nodes: from ``ray.nodes()``, to check that each worker fits on one node. Empty: no such check.

    Raises:
        UserError: not even one training fits.
    """
    check_resources(resources, resources.least_workers, "resources.workers", available, nodes)
    have_cpus, have_gpus = available.get("CPU", 0), available.get("GPU", 0)
    # Concurrent trainings have their largest number of workers each.
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
    """Check that a cluster is large enough for a number of workers.

    Args:
        setting: the setting with the number of workers, for the message.
        available, nodes: as in ``max_concurrent_trainings``.

    Raises:
        UserError: the cluster has too few CPUs or GPUs.
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
        fitting = sum(_workers_on_node(node["Resources"], each) for node in nodes if node["Alive"])
        if fitting < workers:
            raise UserError(
                f"resources: {workers} workers of {each['CPU']:g} CPUs and {each['GPU']:g} GPUs, each on one node, and"
                f" the nodes have room for {fitting}; lower resources.cpus_per_worker, .gpus_per_worker or {setting}"
            )


def _workers_on_node(has: dict[str, float], each: dict[str, float]) -> int:
    """Return the number of workers that fit on a node."""
    return min((int(has.get(kind, 0) / amount + 1e-6) for kind, amount in each.items() if amount), default=0)
