"""The Ray of a script: its environment, its start or connection, its size, and checks of its nodes.

Scripts use this module before they import Ray, so its functions import Ray where they need it.
"""

import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from umbrella.base import UserError, mask_secrets, note, pluralise
from umbrella.fileio import LocksUnavailable, check_writable, lock
from umbrella.training.settings import ResourceSettings

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # seconds between health checks of workers; default 2
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints each line of a worker twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the training prints its own progress
    "RAY_DATA_LOG_LEVEL": "WARNING",  # INFO prints several lines at each evaluation
    "RAY_DATA_USE_LEGACY_DATASET_IDS": "1",  # a counter after the name of a dataset on the dashboard, not a hash
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # for readable progress lines of a training
    "RAY_DEDUP_LOGS": "0",  # it adds a hint to lines that several workers print
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train blocks in its own actors
}
"""Environment variables for all processes. Variables that are already set keep their values."""
LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all processes of Ray listen on 127.0.0.1 only
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process per training that checks whether its node will be preempted
}
"""Variables for a local Ray. With the first one no other node can join."""
DASHBOARD = "RAY_API_SERVER_ADDRESS"
"""Address of the dashboard that Ray Train asks for the state of actors. Without it Ray Train looks for any Ray."""
PORT = 8265
"""Port of the dashboard, if it is free."""
OTHER_PORTS = range(20_000, 32_768)
"""Ports outside of those of Ray's workers and of the ephemeral ports of the system."""
SHARED_MEMORY = "/dev/shm"
SOCKET_PATH = 107 if sys.platform == "linux" else 103
"""Largest length of the path of a Unix socket, in bytes."""
SPARE_CPUS = 1.0
"""CPUs that must stay free beside the workers. Ray Train and Ray Data place actors that need one free CPU to be placed
(and none to run); with less, they and the trainings wait for ever."""
PACKAGES = ("umbrella-mri", "ray", "torch", "transformers")
"""Packages that must have the same version on all nodes."""
NODE_TIMEOUT = 180.0
"""Seconds within which a node must answer. It may have to start a process first."""


def prepare_environment(ray_address: str) -> None:
    """Set the environment variables of Ray. Call it before Ray is imported.

    Args:
        ray_address: see ``ResourceSettings.ray_address``.
    """
    for name, value in (ENVIRONMENT | (LOCAL if ray_address == "local" else {})).items():
        os.environ.setdefault(name, value)


def start_ray(resources: ResourceSettings, log_to_driver: bool, name: str = "") -> None:
    """Connect to the cluster that the settings name, or start a local Ray; print the address of its dashboard.

    A local Ray listens on localhost only if ``prepare_environment`` ran before Ray was imported, as in the scripts.

    Args:
        name: of the job on Ray's dashboard; a name given to ``ray job submit`` takes precedence.

    Raises:
        UserError: the cluster does not answer or refuses this process; Ray cannot write its files here.
    """
    prepare_environment(resources.ray_address)
    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_config import JobConfig

    if ray.is_initialized():
        return
    address = resources.ray_address
    named = mask_secrets(f"{'resources.address' if resources.address else 'RAY_ADDRESS'}={address}")
    handler = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack:
        options: dict[str, Any]
        if address == "local":
            check_local_folders()
            create_token()
            options = {"include_dashboard": True, "dashboard_port": stack.enter_context(reserve_dashboard_port())}
            # Ray inherits the environment of this process; a runtime environment would make every start slower.
            os.environ[DASHBOARD] = f"http://127.0.0.1:{options['dashboard_port']}"
        else:
            check_reachable(address, named)
            options = {"runtime_env": {"env_vars": {name: os.environ[name] for name in ENVIRONMENT}}}
        try:
            context = ray.init(
                address=address,
                log_to_driver=log_to_driver,
                logging_level="ERROR",
                job_config=JobConfig(metadata={"job_name": name} if name else {}),
                **options,
            )
        except (ConnectionError, AuthenticationError) as error:
            # Ray has one error for a missing cluster and for another token.
            remedy = "set RAY_AUTH_MODE=token, and the cluster's token as RAY_AUTH_TOKEN or in ~/.ray/auth_token"
            why = " ".join(str(error).split())[:300]
            if isinstance(error, AuthenticationError):
                why = f"the cluster requires a token, and there is none here; {remedy}"
            elif address.rpartition(":")[2].isdigit():
                why = f"the cluster answers but refuses this process; {remedy} (or it has another version of Ray)"
            raise UserError(f"{named}: {why}") from None
    if threading.current_thread() is threading.main_thread():
        # Instead of the handler of ``ray.init``, which prints a stack trace and exits with 15.
        by_default = handler in (signal.SIG_DFL, None)
        signal.signal(signal.SIGTERM, (lambda *_: sys.exit(128 + signal.SIGTERM)) if by_default else handler)
    if context.dashboard_url:
        token = " (token: ray get-auth-token)" if os.environ.get("RAY_AUTH_MODE") == "token" else ""  # set by Ray
        print(f"Ray dashboard, while this runs: http://{context.dashboard_url}{token}", flush=True)


def join_cluster(resources: ResourceSettings, name: str, log_to_driver: bool = False) -> None:
    """Connect to a running cluster if there is one, because its nodes decode volumes; do not start a local Ray.

    For the arguments see ``start_ray``.
    """
    if resources.ray_address != "local":
        start_ray(resources, log_to_driver, name)


@contextmanager
def reserve_dashboard_port() -> Iterator[int]:
    """Find a free port of localhost, ``PORT`` if possible. Other scripts of this user wait, so they find another."""
    with open(Path(tempfile.gettempdir()) / f"umbrella_start_{os.getuid()}.lock", "w") as file:
        with suppress(LocksUnavailable):
            lock(file, wait=True)
        port = PORT
        while True:
            with suppress(OSError), socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
                break
            port = secrets.choice(OTHER_PORTS)
        yield port


def check_reachable(address: str, named: str) -> None:
    """Raise UserError if nothing listens at the address of a cluster. Ray would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as fault:
        why = getattr(fault, "strerror", None) or fault
        raise UserError(f"{named}: nothing answers there ({why}); start the cluster, or give another address") from None


def check_local_folders() -> None:
    """Raise UserError if a local Ray cannot write its sockets and objects."""
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(variable, "/tmp")
    longest = SOCKET_PATH - len(f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store")
    if len(os.fsencode(folder)) > longest:
        raise UserError(
            f"{variable}={folder}: the path is longer than {longest} bytes, the limit for Ray's sockets; set"
            " RAY_TMPDIR to a shorter folder"
        )
    check_writable(folder, f"{variable}={folder}: the folder for Ray's files")
    if os.path.isdir(SHARED_MEMORY):
        check_writable(SHARED_MEMORY, f"{SHARED_MEMORY}, where Ray keeps objects,")


def create_token() -> None:
    """Create the token of a local Ray, readable by its owner only. A token that Ray creates is readable by all."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ}:
        return
    token = Path.home() / ".ray" / "auth_token"
    if not os.path.exists(token):
        check_writable(token.parent, f"{token.parent}, where Ray keeps its token,")
        with suppress(FileExistsError):
            descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
    with suppress(OSError):  # it belongs to another user
        token.chmod(0o600)


def alive_nodes() -> list[dict[str, Any]]:
    """Return the nodes of the cluster that are alive, as ``ray.nodes`` describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def has_several_nodes() -> bool:
    """Whether this process has joined a Ray cluster of more than one node."""
    ray = sys.modules.get("ray")  # not imported here, which takes a second: a process that has joined has imported it
    return ray is not None and ray.is_initialized() and len(alive_nodes()) > 1


def max_concurrent_trainings(resources: ResourceSettings, nodes: Sequence[Mapping[str, float]] | None = None) -> int:
    """Return the number of trainings that can run at the same time, with no more workers than CPUs.

    Raises UserError if not even one fits; for ``nodes`` see ``check_resources``.
    """
    have = check_resources(resources, resources.least_workers, "resources.workers", nodes)
    if have["GPU"] and not resources.gpus_per_worker:
        gpus = pluralise(int(have["GPU"]), "GPU")
        note(f"these settings use none of {gpus}; add gpu_host.yaml to the command, or resources.gpus_per_worker=1")
    # Concurrent trainings have their largest number of workers each.
    workers = resources.workers
    most = min((have["CPU"] - SPARE_CPUS) / (workers * resources.cpus_per_worker), have["CPU"] / workers)
    if resources.gpus_per_worker:
        most = min(most, have["GPU"] / (workers * resources.gpus_per_worker))
    return max(1, int(most))


def check_resources(
    resources: ResourceSettings, workers: int, setting: str, nodes: Sequence[Mapping[str, float]] | None = None
) -> dict[str, float]:
    """Check that a cluster is large enough for a number of workers: Ray would wait for ever without a message.

    Args:
        setting: the setting with the number of workers, for the message.
        nodes: CPUs and GPUs of each node, as {"CPU": 8, "GPU": 1}. None: those of the cluster that is connected.

    Returns:
        The CPUs and GPUs of all nodes.

    Raises:
        UserError: the cluster has too few CPUs or GPUs, in all or on each node.
    """
    nodes = [node["Resources"] for node in alive_nodes()] if nodes is None else nodes
    each = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    have = {kind: sum(node.get(kind, 0) for node in nodes) for kind in each}
    for kind, name, spare in (("CPU", "cpus_per_worker", SPARE_CPUS), ("GPU", "gpus_per_worker", 0.0)):
        needed = workers * each[kind] + spare
        if needed > have[kind]:
            helpers = f" and {spare:g} for Ray's helpers" if spare else ""
            raise UserError(
                f"resources: {workers} workers of {each[kind]:g} {kind}s{helpers} need {needed:g} {kind}s, and Ray has"
                f" {have[kind]:g}; lower resources.{name} or {setting}"
            )
    fitting = sum(
        min(int(node.get(kind, 0) / amount + 1e-6) for kind, amount in each.items() if amount) for node in nodes
    )
    if fitting < workers:
        raise UserError(
            f"resources: {workers} workers of {each['CPU']:g} CPUs and {each['GPU']:g} GPUs, each on one node, and"
            f" the nodes have room for {fitting}; lower resources.cpus_per_worker, .gpus_per_worker or {setting}"
        )
    return have


def check_nodes(folders: Mapping[str, Path], files: Sequence[Path]) -> None:
    """Check that every node has the same folders, files and package versions, if the cluster has several nodes.

    Args:
        folders: setting, such as "resources.storage", to its folder, which must be writable.
        files: files that must be readable.

    Raises:
        UserError: this node cannot write to a folder; or one line for each problem of a node, with the remedy.
    """
    if not has_several_nodes():
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for setting, folder in folders.items():
        check_writable(folder, f"{setting}={folder}")
    token = f".seen-by-all-{uuid4().hex}"
    tokens = [folder / token for folder in folders.values()]
    lines = []
    try:
        for file in tokens:
            file.touch()
        remote = ray.remote(num_cpus=0, max_retries=0)(find_problems)
        tasks = {}
        for node in alive_nodes():
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = remote.options(scheduling_strategy=strategy).remote(folders, files, token, installed_versions())
            tasks[task] = node
        done, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=NODE_TIMEOUT)
        for task, node in tasks.items():
            problems = [f"did not answer within {NODE_TIMEOUT:g} s; is it overloaded?"]
            if task in done:
                problems = _result(task, node)
            name = f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
            lines += [f"{name}: {problem}" for problem in problems]
    finally:
        for file in tokens:
            file.unlink(missing_ok=True)
    if lines:
        raise UserError("\n".join(sorted(lines)))


def _result(task: Any, node: Mapping[str, Any]) -> list[str]:
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        time.sleep(0.1)
        if node["NodeID"] not in {one["NodeID"] for one in alive_nodes()}:
            return []  # the node has left the cluster
        last = str(error).strip().splitlines()[-1]
        return [f"cannot run UMBRELLA: {last}; install it, with the same Python, on every node"]


def installed_versions() -> dict[str, str]:
    """Return the versions that must be the same on all nodes, by package."""
    return {"Python": f"{sys.version_info.major}.{sys.version_info.minor}", **{p: _version(p) for p in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def find_problems(
    folders: Mapping[str, Path], files: Sequence[Path], token: str, versions: Mapping[str, str]
) -> list[str]:
    """Find missing folders and files, and versions that differ from those given, on the node that runs this.

    Args:
        folders, files: as in ``check_nodes``.
        token: name of a file that is in each folder.
    """
    problems, unshared = [], []
    for setting, folder in folders.items():
        if not (folder / token).exists():
            what = "is another folder here" if folder.is_dir() else "is not there"
            problems.append(f"{setting}={folder} {what}; mount the same one at this path on every node")
            unshared.append(folder)
            continue
        try:
            check_writable(folder, f"{setting}={folder}")
        except UserError as error:
            problems.append(f"{error}; let this user write there")
    unseen = [file for file in files if not file.exists() and not any(folder in file.parents for folder in unshared)]
    problems += [f"the volume {file} is not there; mount the volumes at the same path on every node" for file in unseen]
    own = installed_versions()
    differing = [f"{name} {own.get(name)} instead of {v}" for name, v in versions.items() if own.get(name) != v]
    if differing:
        problems.append(f"has {', '.join(differing)}; install the same versions on every node")
    return problems
