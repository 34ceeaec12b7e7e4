"""Volumes into the store, by processes of this machine or by the nodes of a cluster."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

import joblib

from umbrella.base import UserError
from umbrella.nodes import living, several_nodes
from umbrella.volumes.store import VolumeStore

GROUP = 4
"""Volumes to a task. Larger groups would make the bar jump, smaller ones cost more in talk than they do in work."""
Volume = tuple[str, str]
"""A path, and its modality."""


def reasons_of(store: VolumeStore, volumes: Sequence[Volume], processes: int) -> Iterator[str]:
    """Bring volumes into the store; of each, in order, why it cannot be used. Empty where it can, and is there now.

    Args:
        processes: as many at once; 0: one per CPU, of this machine or of the cluster that this process has joined.

    Raises:
        OSError: the store cannot be written.
    """
    if processes != 1 and several_nodes():
        return _by_nodes(store, volumes, processes)
    jobs = processes or joblib.cpu_count()
    tasks = joblib.Parallel(n_jobs=jobs, return_as="generator", batch_size=GROUP if jobs > 1 else 1)
    return tasks(joblib.delayed(reason)(store, *volume) for volume in volumes)


def reason(store: VolumeStore, path: str, modality: str) -> str:
    """Why a volume cannot be used; empty where it can, and is in the store now."""
    try:
        store.get(path, modality)
    except UserError as error:
        return str(error)
    return ""


def _by_nodes(store: VolumeStore, volumes: Sequence[Volume], processes: int) -> Iterator[str]:
    import ray

    # Ray itself gives what asks for no GPU to nodes without one, as long as they have a CPU free.
    task = ray.remote(num_cpus=1)(_reasons)
    groups = (volumes[start : start + GROUP] for start in range(0, len(volumes), GROUP))
    at_once = processes or 2 * int(sum(node["Resources"].get("CPU", 0) for node in living()))
    asked = deque(task.remote(store, group) for group in islice(groups, at_once))
    while asked:
        try:
            yield from ray.get(asked.popleft())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        asked.extend(task.remote(store, group) for group in islice(groups, 1))


def _reasons(store: VolumeStore, volumes: Sequence[Volume]) -> list[str]:
    return [reason(store, *volume) for volume in volumes]
