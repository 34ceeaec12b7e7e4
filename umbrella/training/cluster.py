"""The Ray of a script: a cluster that is joined, or one of this machine's own."""

import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NoReturn

import ray
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig

from umbrella.base import UserError, mask_secrets
from umbrella.fileio import LocksUnavailable, check_writable, lock
from umbrella.ray_environment import ENVIRONMENT, prepare_environment
from umbrella.training.settings import ResourceSettings

DASHBOARD = "RAY_API_SERVER_ADDRESS"
"""Names the dashboard that Ray Train asks for the state of actors. Without it Ray Train looks for any Ray there is."""
PORT = 8265
"""The dashboard's port, unless it is taken."""
OTHER_PORTS = range(20_000, 32_768)
"""Ports that neither Ray's workers use nor systems give to whoever asks for any port."""
SHARED_MEMORY = "/dev/shm"
SOCKET_PATH = 107 if sys.platform == "linux" else 103
"""Bytes that the path of a Unix socket may have."""


def start_ray(resources: ResourceSettings, log_to_driver: bool, name: str = "") -> str:
    """Connect to the cluster that the settings name, or start a Ray of this machine's own.

    That listens on localhost only, if ``prepare_environment`` ran before Ray was imported, as it does in scripts.

    Args:
        name: of the job on Ray's dashboard; one that ``ray job submit`` was given goes before it.

    Returns the dashboard's address; empty where there is none, or Ray was started before.

    Raises:
        UserError: the cluster is not there, or does not let this process in; Ray cannot write here what it must.
    """
    prepare_environment(resources.ray_address)
    if ray.is_initialized():
        return ""
    address = resources.ray_address
    named = mask_secrets(f"{'resources.address' if resources.address else 'RAY_ADDRESS'}={address}")
    if address == "local":
        check_local_folders()
        create_token()
    else:
        check_reachable(address, named)
    try:
        with _own_sigterm(), start_lock() if address == "local" else nullcontext():
            if address == "local":
                # Ray inherits this process's environment; a runtime environment would slow every start.
                port = free_port()
                os.environ[DASHBOARD] = f"http://127.0.0.1:{port}"
                options: dict[str, Any] = {"include_dashboard": True, "dashboard_port": port}
            else:
                options = {"runtime_env": {"env_vars": {name: os.environ[name] for name in ENVIRONMENT}}}
            context = ray.init(
                address=address,
                log_to_driver=log_to_driver,
                logging_level="ERROR",
                job_config=JobConfig(metadata={"job_name": name} if name else {}),
                **options,
            )
    except (ConnectionError, AuthenticationError) as error:
        raise UserError(f"{named}: {_why_not(error, address)}") from None
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""


def join_cluster(resources: ResourceSettings, log_to_driver: bool, name: str) -> str:
    """``start_ray`` where there is a cluster to join: its nodes are asked, and decode, before anything starts."""
    return "" if resources.ray_address == "local" else start_ray(resources, log_to_driver, name)


@contextmanager
def start_lock() -> Iterator[None]:
    """Let the scripts of a user start their Rays one after another: two at once would take the same port."""
    with open(Path(gettempdir()) / f"umbrella_start_{os.getuid()}.lock", "w") as file:
        with suppress(LocksUnavailable):
            lock(file, wait=True)
        yield


def free_port() -> int:
    """A port of localhost that nobody listens on: ``PORT`` if possible."""
    port = PORT
    while True:
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
        port = secrets.choice(OTHER_PORTS)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM, prints where the process is, and exits with 15. After this, what was there before acts, or an
    exit with 143, at which Ray ends its processes."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _exit if before in (signal.SIG_DFL, None) else before)


def _exit(*unused: Any) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def check_reachable(address: str, named: str) -> None:
    """Raise UserError where nobody listens at a cluster's address. Ray tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as fault:
        why = getattr(fault, "strerror", None) or fault
        raise UserError(f"{named}: nobody answers there ({why}); start the cluster, or name another address") from None


def check_local_folders() -> None:
    """Raise UserError where a Ray of our own cannot keep its sockets and objects."""
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(variable, "/tmp")
    below = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    longest = SOCKET_PATH - len(below)
    if len(os.fsencode(folder)) > longest:
        raise UserError(
            f"{variable}={folder}: is longer than the {longest} bytes that the paths of Ray's sockets leave for it; set"
            " RAY_TMPDIR to a shorter folder"
        )
    check_writable(folder, f"{variable}={folder}: the folder for Ray's files")
    if os.path.isdir(SHARED_MEMORY):
        check_writable(SHARED_MEMORY, f"{SHARED_MEMORY}, where Ray keeps objects,")


def create_token() -> None:
    """Make the token of a Ray of our own for its owner alone. Ray itself would let everybody read it.

    Raises:
        UserError: there is none, and no place for it.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ}:
        return
    token = Path.home() / ".ray" / "auth_token"
    if not os.path.exists(token):
        check_writable(token.parent, f"{token.parent}, where Ray keeps its token,")
        with (
            suppress(FileExistsError),
            os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file,
        ):
            file.write(secrets.token_hex(32))
    with suppress(OSError):  # another user's
        token.chmod(0o600)


def _why_not(error: Exception, address: str) -> str:
    """Why a cluster cannot be joined. Ray says the same of one that is not there and of one with another token."""
    remedy = "set RAY_AUTH_MODE=token, and the cluster's token as RAY_AUTH_TOKEN or in ~/.ray/auth_token"
    if isinstance(error, AuthenticationError):
        return f"asks for a token, and there is none here; {remedy}"
    if address.rpartition(":")[2].isdigit():
        return f"a cluster answers, and does not let this process in; {remedy} (other versions of Ray do the same)"
    return " ".join(str(error).split())[:300]
