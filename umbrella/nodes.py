"""The machines of a Ray cluster, before anything starts on them: whether each sees what all of them must share."""

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
"""What makes other numbers in another version, or does not understand the other one's messages."""
ANSWER = 180.0
"""Seconds in which a node has to answer: one that has run nothing yet starts a process for it first."""


@dataclass(frozen=True)
class SharedFiles:
    """What every node must see.

    Args:
        folders: settings, as in "resources.storage", to their folders, which are written to.
        files: some of what is only read.
        token: the name of a file that lies in each folder while nodes look.
    """

    folders: Mapping[str, Path]
    files: Sequence[Path]
    token: str


def has_several_nodes() -> bool:
    """Whether this process has joined a Ray cluster of more than one node."""
    ray = sys.modules.get("ray")  # importing it takes a second, and whoever has joined has it
    return ray is not None and ray.is_initialized() and len(alive_nodes()) > 1


def alive_nodes() -> list[dict[str, Any]]:
    """The nodes that are there, as Ray describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def check_nodes(folders: Mapping[str, Path], files: Sequence[Path]) -> None:
    """Let every node of the cluster look at what all share; nothing where there is only one.

    Args:
        folders, files: see ``SharedFiles``.

    Raises:
        UserError: a folder that this node cannot write to; or a line for each fault: which node cannot see what, and
            the remedy.
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
        asked = {}
        for node in alive_nodes():
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[remote.options(scheduling_strategy=here).remote(shared, versions)] = node
        done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER)
        lines = [f"{node_name(asked[one])}: did not answer within {ANSWER:g} s; is it overloaded?" for one in silent]
        for one in done:
            lines += [f"{node_name(asked[one])}: {fault}" for fault in _told(one, asked[one])]
    if lines:
        raise UserError("\n".join(sorted(lines)))


def node_name(node: Mapping[str, Any]) -> str:
    """A node in words."""
    return f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']})"


def installed_versions() -> dict[str, str]:
    """Of what must be the same everywhere, by name."""
    return {"Python": f"{sys.version_info.major}.{sys.version_info.minor}", **{p: _version(p) for p in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def find_problems(shared: SharedFiles, versions: Mapping[str, str]) -> list[str]:
    """What is wrong here, where this runs: what is to be shared and is not, and other versions than those given."""
    found = []
    for setting, folder in shared.folders.items():
        if not (folder / shared.token).exists():
            what = "is another folder here" if folder.is_dir() else "is not there"
            found.append(f"{setting}={folder} {what}; mount the same one at this path on every node")
            continue
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            fault = describe_storage_error(error) or str(error)
            found.append(f"{setting}={folder} cannot be written to: {fault}; let this user write there")
    unshared = [folder for folder in shared.folders.values() if not (folder / shared.token).exists()]
    unseen = [f for f in shared.files if not os.path.exists(f) and not any(u in f.parents for u in unshared)]
    found += [f"the volume {file} is not there; mount the volumes at the same path on every node" for file in unseen]
    own = installed_versions()
    differing = [f"{name} {own.get(name)} instead of {v}" for name, v in versions.items() if own.get(name) != v]
    if differing:
        found.append(f"has {', '.join(differing)}; install the same versions on every node")
    return found


def _told(answer: Any, node: Mapping[str, Any]) -> list[str]:
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayError as error:
        time.sleep(0.1)
        if node["NodeID"] not in {one["NodeID"] for one in alive_nodes()}:
            return []  # it went meanwhile, and is nobody's concern
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
