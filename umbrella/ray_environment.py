"""Environment variables that Ray reads at import. Those of MLflow are in ``tracking``."""

import os

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # seconds between health checks of workers; default 2
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints each line of a worker twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the training prints its own progress
    "RAY_DATA_LOG_LEVEL": "WARNING",  # INFO prints several lines at each evaluation
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # for readable progress lines of a training
    "RAY_DEDUP_LOGS": "0",  # it adds a hint to lines that several workers print
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train blocks in its own actors
}
"""Variables for all processes. Variables that are already set keep their values."""
LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all processes of Ray listen on 127.0.0.1 only
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process per training that checks whether its node will be preempted
}
"""Variables for a local Ray. With the first one no other node can join."""


def prepare_environment(ray_address: str) -> None:
    """Set the environment variables. Call it before Ray is imported.

    Args:
        ray_address: see ``ResourceSettings.ray_address``.
    """
    for name, value in (ENVIRONMENT | (LOCAL if ray_address == "local" else {})).items():
        os.environ.setdefault(name, value)
