"""A training on a Ray cluster of several nodes, all on this machine, which are lost under it.

lost_node.py settings.yaml moved    one worker: its node is lost, and the next one is drained before it goes
lost_node.py settings.yaml fewer    two workers on two nodes, of which one is lost: one worker goes on
"""

import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# These trainings take seconds. Up to 20 s after a node was lost, Ray Train still tries to start workers there.
os.environ |= {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.1", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8"}

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from integration.faults import folder_of, go_on, training_workers, when_step
from umbrella.config import load_settings
from umbrella.training.progress import latest_checkpoint, read_progress

LOCAL = {"node_ip_address": "127.0.0.1"}


def node_of_worker(cluster: Cluster) -> Any:
    """A node with a training worker, other than the first one, where the script is."""
    by_pid = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    return next(by_pid[worker.ppid()] for worker in training_workers() if worker.ppid() in by_pid)


def drain(cluster: Cluster, node: Any) -> None:
    """Say that a node will be taken away within a minute, as the autoscaler of a cloud says it."""
    deadline = int(1000 * (time.time() + 60))
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node.node_id, DRAIN_NODE_REASON_PREEMPTION, "a test", deadline
    )
    assert accepted, why


def main(file: str, how: str) -> None:
    """Run the training to its end."""
    with mock.patch.object(ray._private.services, "resolve_ip_for_localhost", lambda host: host):
        head = {**LOCAL, "num_cpus": 0 if how == "moved" else 3, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(3 if how == "moved" else 1):
            cluster.add_node(**LOCAL, num_cpus=3)
        settings = load_settings([file], {"resources.address": cluster.address})
        folder = folder_of(settings)

        def lose() -> None:
            cluster.remove_node(node_of_worker(cluster), allow_graceful=False)
            if how == "moved":
                when_step(folder, 20, drain_and_lose)

        def drain_and_lose() -> None:
            node = node_of_worker(cluster)
            drain(cluster, node)
            while True:
                newest = latest_checkpoint(folder)
                if newest and read_progress(newest).step % settings.train.evaluate_every:
                    break
                time.sleep(0.01)
            print(f"saved at step {read_progress(newest).step} before its node went", flush=True)
            cluster.remove_node(node, allow_graceful=False)

        when_step(folder, 8, lose)
        go_on(settings)
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
