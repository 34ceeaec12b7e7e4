"""Check that all nodes of a Ray cluster have the same folders, files and package versions."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from umbrella.base import UserError
from umbrella.fileio import check_writable, describe_storage_error

PACKAGES = ("umbrella-mri", "ray", "torch", "transformers")
"""Packages that must have the same version on all nodes."""
TIMEOUT = 180.0
"""Seconds within which a node must answer. It may have to start a process first."""


@dataclass(frozen=True)
class SharedFiles:
    """Folders and files that every node must have.

    Args:
        folders: setting, such as "resources.storage", to its folder, which must be writable.
        files: files that must be readable.
        token: name of a file that is in each folder during the check.
    """

    folders: Mapping[str, Path]
    files: Sequence[Path]
    token: str


def has_several_nodes() -> bool:
    """Whether this process has joined a Ray cluster of more than one node."""
    ray = sys.modules.get("ray")  # not imported here, which takes a second: a process that has joined has imported it
    return ray is not None and ray.is_initialized() and len(alive_nodes()) > 1


def alive_nodes() -> list[dict[str, Any]]:
    """Return the nodes of the cluster that are alive, as ``ray.nodes`` describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def check_nodes(folders: Mapping[str, Path], files: Sequence[Path]) -> None:
    """Check every node of the cluster, if there are several.

    Args:
        folders, files: see ``SharedFiles``.

    Raises:
        UserError: this node cannot write to a folder; or one line for each problem of a node, with the remedy.
    """
    if not has_several_nodes():
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for setting, folder in folders.items():
        check_writable(folder, f"{setting}={folder}")
    with _token(folders) as token:
        shared, versions = SharedFiles(folders, files, token), installed_versions()
        remote = ray.remote(num_cpus=0, max_retries=0)(find_problems)
        tasks = {}
        for node in alive_nodes():
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            tasks[remote.options(scheduling_strategy=strategy).remote(shared, versions)] = node
        done, silent = ray.wait(list(tasks), num_returns=len(tasks), timeout=TIMEOUT)
        lines = [f"{node_name(tasks[task])}: did not answer within {TIMEOUT:g} s; is it overloaded?" for task in silent]
        for task in done:
            lines += [f"{node_name(tasks[task])}: {problem}" for problem in _result(task, tasks[task])]
    if lines:
        raise UserError("\n".join(sorted(lines)))


def node_name(node: Mapping[str, Any]) -> str:
    """Address and host name of a node, for messages."""
    return f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']})"


def installed_versions() -> dict[str, str]:
    """Return the versions that must be the same on all nodes, by package."""
    return {"Python": f"{sys.version_info.major}.{sys.version_info.minor}", **{p: _version(p) for p in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def find_problems(shared: SharedFiles, versions: Mapping[str, str]) -> list[str]:
    """Find missing folders and files, and versions that differ from those given, on the node that runs this."""
    problems = []
    for setting, folder in shared.folders.items():
        if not (folder / shared.token).exists():
            what = "is another folder here" if folder.is_dir() else "is not there"
            problems.append(f"{setting}={folder} {what}; mount the same one at this path on every node")
            continue
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            fault = describe_storage_error(error) or str(error)
            problems.append(f"{setting}={folder} cannot be written to: {fault}; let this user write there")
    unshared = [folder for folder in shared.folders.values() if not (folder / shared.token).exists()]
    unseen = [f for f in shared.files if not os.path.exists(f) and not any(u in f.parents for u in unshared)]
    problems += [f"the volume {file} is not there; mount the volumes at the same path on every node" for file in unseen]
    own = installed_versions()
    differing = [f"{name} {own.get(name)} instead of {v}" for name, v in versions.items() if own.get(name) != v]
    if differing:
        problems.append(f"has {', '.join(differing)}; install the same versions on every node")
    return problems


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


@contextmanager
def _token(folders: Mapping[str, Path]) -> Iterator[str]:
    name = f".seen-by-all-{uuid4().hex}"
    files = [folder / name for folder in folders.values()]
    try:
        for file in files:
            file.touch()
        yield name
    finally:
        for file in files:
            file.unlink(missing_ok=True)
