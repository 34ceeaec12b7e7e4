"""How many trainings fit on a cluster, and on a Ray of this machine's own."""

from ray._private.resource_and_label_spec import ResourceAndLabelSpec

from umbrella.base import UserError
from umbrella.training.settings import ResourceSettings

SPARE_CPUS = 1.0
"""What must stay free beside the workers: Ray Train and Ray Data place helpers that ask for one CPU to be placed and
none to run. Where less than one is free they wait for ever, and the trainings with them, without a word."""


def this_machine() -> dict[str, float]:
    """The CPUs and GPUs that a Ray of this machine's own has: those that containers and environment leave to it."""
    found = ResourceAndLabelSpec()
    found.resolve(is_head=True)
    return {"CPU": float(found.num_cpus), "GPU": float(found.num_gpus)}


def trainings_that_fit(resources: ResourceSettings, available: dict[str, float]) -> int:
    """How many trainings run at once on a cluster: as many as their reservations allow, and no more workers than CPUs.

    Raises:
        UserError: not even one does; says what is short.
    """
    check_fits(resources, resources.least_workers, "resources.workers", available)
    have_cpus, have_gpus = available.get("CPU", 0), available.get("GPU", 0)
    # Beside each other, trainings have all the workers that they may have.
    by_cpu = min(
        (have_cpus - SPARE_CPUS) / (resources.workers * resources.cpus_per_worker), have_cpus / resources.workers
    )
    gpus = resources.workers * resources.gpus_per_worker
    return max(1, int(min(by_cpu, have_gpus / gpus if gpus else by_cpu)))


def check_fits(resources: ResourceSettings, workers: int, setting: str, available: dict[str, float]) -> None:
    """Raise UserError where a cluster has not enough for so many workers; says what is short.

    Args:
        setting: what says how many workers there are.
    """
    cpus, gpus = workers * resources.cpus_per_worker, workers * resources.gpus_per_worker
    have_cpus, have_gpus = available.get("CPU", 0), available.get("GPU", 0)
    if cpus + SPARE_CPUS > have_cpus:
        raise UserError(
            f"resources: {workers} workers of {resources.cpus_per_worker:g} CPUs and {SPARE_CPUS:g} for Ray's"
            f" helpers need {cpus + SPARE_CPUS:g} CPUs, and Ray has {have_cpus:g}; lower resources.cpus_per_worker or"
            f" {setting}"
        )
    if gpus > have_gpus:
        raise UserError(
            f"resources: {workers} workers of {resources.gpus_per_worker:g} GPUs need {gpus:g} GPUs, and Ray"
            f" has {have_gpus:g}; lower resources.gpus_per_worker or {setting}"
        )
