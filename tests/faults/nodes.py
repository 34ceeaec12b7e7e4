"""A Ray cluster of several nodes on this machine, each started by ``ray start`` as on a machine of its own.

Each node has its own loopback address, so that Ray treats it as a machine and nothing listens on other interfaces.
Joining requires the cluster's token.
"""

import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.faults.fault_injection import environment_without_ray, kill, training_workers

RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
ANY_PORT = ["min-worker", "max-worker", "node-manager", "object-manager", "metrics-export", "runtime-env-agent"]
AGENT_PORT = ["dashboard-agent-listen", "dashboard-agent-grpc"]
QUICKLY = {
    # Short trainings: for some seconds after a node was lost, Ray Train still tries to start workers there.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_health_check_period_ms": "1000",
}


class Nodes:
    """A cluster: its address and its nodes, the head first."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="um", dir="/tmp"))  # sockets have to have short names
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        # Ray would repeat lines that occurred several times when a script ends, after the script's own last line.
        other = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
        self.environment = environment_without_ray() | QUICKLY | token | other
        self.nodes: list[psutil.Process] = []
        self.address = ""

    def add(self, cpus: int, blind: Path | None = None) -> psutil.Process:
        """Start a node, the first one as the head, and return the process of its ``ray start``.

        Args:
            blind: a folder that is empty on this node only. Skips the test if this needs root.
        """
        if self.address:
            return self._start([f"--address={self.address}"], cpus, blind)
        head = ["--head", "--port=0", "--include-dashboard=false", f"--temp-dir={self.folder}", "--dashboard-port=0"]
        node = self._start(head, cpus)
        self.address = (self.folder / "ray_current_cluster").read_text(encoding="utf-8").strip()
        return node

    def kill(self, node: psutil.Process) -> None:
        """Kill a node, as a power cut does."""
        self.nodes.remove(node)
        _kill(node)

    def node_of_worker(self) -> psutil.Process:
        """Return a node other than the head that has a training worker."""
        return next(node for node in self.nodes[1:] if training_workers(node.pid))

    def node_of_trial(self, folder: Path) -> psutil.Process:
        """Return the node that runs the trial of a folder: a process there has its sample log open."""
        log = str(folder / "samples_0.jsonl")

        def writes(node: psutil.Process) -> bool:
            for process in node.children(recursive=True):
                with suppress(psutil.Error):  # it has ended meanwhile
                    if any(log == file.path for file in process.open_files()):
                        return True
            return False

        return next(node for node in self.nodes if writes(node))

    def drain(self, node: psutil.Process) -> None:
        """Announce that a node ends within a minute, as the autoscaler of a cloud does."""
        raylet = next(process for process in node.children() if process.name() == "raylet")
        (node_id,) = (word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--node_id="))
        self.ray(
            "drain-node", f"--address={self.address}", f"--node-id={node_id}", "--deadline-remaining-seconds=60",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=a test",
        )  # fmt: skip

    def ray(self, *words: str) -> str:
        """Run a command of Ray for this cluster, and return its output."""
        return subprocess.run(
            [*RAY, *words], env=self.environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def run(self, script: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Start a script of experiments/ that joins this cluster."""
        return subprocess.Popen(
            [sys.executable, str(script), *words],
            env=self.environment | {"RAY_ADDRESS": self.address} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End all nodes, the head last, and delete their files."""
        for node in reversed(self.nodes):
            _kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, role: list[str], cpus: int, blind: Path | None = None) -> psutil.Process:
        number = len(list(self.folder.glob("*.log"))) + 2
        log = self.folder / f"{number}.log"
        ports = [f"--{name}-port=0" for name in (*ANY_PORT, *AGENT_PORT)]
        own = [f"--node-ip-address=127.0.0.{number}", f"--num-cpus={cpus}", "--object-store-memory=100000000"]
        words = [*RAY, "start", *role, *own, *ports, "--block"]
        if blind:
            inside = f"mount -t tmpfs none {shlex.quote(str(blind))} && exec {shlex.join(words)}"
            words = ["unshare", "--mount", "sh", "-c", inside]
        with log.open("w") as file:
            started = subprocess.Popen(words, env=self.environment, stdout=file, stderr=subprocess.STDOUT)
        node = psutil.Process(started.pid)
        self.nodes.append(node)
        # The line before it, "Ray runtime started", is printed before the head has written its address.
        while "will now block" not in (said := log.read_text(encoding="utf-8")):
            if started.poll() is not None:
                self.kill(node)
                if blind and ("unshare" in said or "mount" in said):
                    pytest.skip(f"only root may give a node other folders: {said.strip()}")
                raise RuntimeError(said)
            time.sleep(0.05)
        return node


def _kill(node: psutil.Process) -> None:
    family = [node]
    with suppress(psutil.NoSuchProcess):
        family += node.children(recursive=True)
    kill(family)
    psutil.wait_procs(family, 10)


def wait_for_exit(process: subprocess.Popen[str], status: int = 0, within: float = 400) -> str:
    """Wait for a script, and return its standard error."""
    try:
        said, errors = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.kill()
        raise RuntimeError("\n".join(map(str, process.communicate()))) from None
    assert process.returncode == status, said + errors
    return errors


@contextmanager
def nodes(*cpus: int) -> Iterator[Nodes]:
    """Start a cluster with these numbers of CPUs per node, the head first."""
    cluster = Nodes()
    try:
        for one in cpus:
            cluster.add(one)
        yield cluster
    finally:
        cluster.close()
