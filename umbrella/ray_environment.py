"""Environment variables of Ray, which it reads when it is imported. Those of MLflow are in ``tracking``."""

import os

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how often workers are looked at: 2 s unless told otherwise
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line of a worker twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # they flood logs; the run's own lines say the same
    "RAY_DATA_LOG_LEVEL": "WARNING",  # several lines at each evaluation
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # the lines of a training are meant for the user
    "RAY_DEDUP_LOGS": "0",  # it adds a hint of its own to lines that several workers print
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # as Ray Train wants it for its own processes
}
"""For every process of ours; a variable that is set already stays."""
LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # every process of Ray listens on 127.0.0.1 only
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process per training asks whether its node is to be taken away
}
"""For a Ray of this machine's own. With the first one no other node can join."""


def prepare_environment(ray_address: str) -> None:
    """Set the variables, in time if Ray is not imported yet.

    Args:
        ray_address: as ``ResourceSettings.ray_address``.
    """
    for name, value in (ENVIRONMENT | (LOCAL if ray_address == "local" else {})).items():
        os.environ.setdefault(name, value)
