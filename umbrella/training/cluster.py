"""Connect a script to Ray: to a running cluster, or to a local Ray that it starts."""

import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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
"""Address of the dashboard that Ray Train asks for the state of actors. Without it Ray Train looks for any Ray."""
PORT = 8265
"""Port of the dashboard, if it is free."""
OTHER_PORTS = range(20_000, 32_768)
"""Ports outside of those of Ray's workers and of the ephemeral ports of the system."""
SHARED_MEMORY = "/dev/shm"
SOCKET_PATH = 107 if sys.platform == "linux" else 103
"""Largest length of the path of a Unix socket, in bytes."""


def start_ray(resources: ResourceSettings, log_to_driver: bool, name: str = "") -> str:
    """Connect to the cluster that the settings name, or start a local Ray.

    A local Ray listens on localhost only if ``prepare_environment`` ran before Ray was imported, as in the scripts.

    Args:
        name: of the job on Ray's dashboard; a name given to ``ray job submit`` takes precedence.

    Returns:
        The address of the dashboard; empty if there is none, or if Ray was started before.

    Raises:
        UserError: the cluster does not answer or refuses this process; Ray cannot write its files here.
    """
    prepare_environment(resources.ray_address)
    if ray.is_initialized():
        return ""
    address = resources.ray_address
    named = mask_secrets(f"{'resources.address' if resources.address else 'RAY_ADDRESS'}={address}")
    options: AbstractContextManager[dict[str, Any]]
    if address == "local":
        check_local_folders()
        create_token()
        options = _local_options()
    else:
        check_reachable(address, named)
        options = nullcontext({"runtime_env": {"env_vars": {name: os.environ[name] for name in ENVIRONMENT}}})
    try:
        with _keep_sigterm_handler(), options as arguments:
            context = ray.init(
                address=address,
                log_to_driver=log_to_driver,
                logging_level="ERROR",
                job_config=JobConfig(metadata={"job_name": name} if name else {}),
                **arguments,
            )
    except (ConnectionError, AuthenticationError) as error:
        raise UserError(f"{named}: {_describe_connection_error(error, address)}") from None
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""


def join_cluster(resources: ResourceSettings, log_to_driver: bool, name: str) -> str:
    """Connect to a running cluster if there is one, because its nodes decode volumes; do not start a local Ray."""
    return "" if resources.ray_address == "local" else start_ray(resources, log_to_driver, name)


@contextmanager
def start_lock() -> Iterator[None]:
    """Let the scripts of a user start Ray one after the other: two at the same time would choose the same port."""
    with open(Path(gettempdir()) / f"umbrella_start_{os.getuid()}.lock", "w") as file:
        with suppress(LocksUnavailable):
            lock(file, wait=True)
        yield


@contextmanager
def _local_options() -> Iterator[dict[str, Any]]:
    """Arguments of ``ray.init`` for a local Ray. The port of its dashboard stays reserved inside the block."""
    with start_lock():
        port = free_port()
        # Ray inherits the environment of this process; a runtime environment would make every start slower.
        os.environ[DASHBOARD] = f"http://127.0.0.1:{port}"
        yield {"include_dashboard": True, "dashboard_port": port}


def free_port() -> int:
    """Return a free port of localhost: ``PORT`` if possible."""
    port = PORT
    while True:
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
        port = secrets.choice(OTHER_PORTS)


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Restore the handler of SIGTERM that ``ray.init`` replaces, or exit with 143; Ray then ends its processes too.

    Ray's own handler prints a stack trace and exits with 15.
    """
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _exit if before in (signal.SIG_DFL, None) else before)


def _exit(*unused: Any) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


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
    below = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    longest = SOCKET_PATH - len(below)
    if len(os.fsencode(folder)) > longest:
        raise UserError(
            f"{variable}={folder}: the path is longer than {longest} bytes, the limit for Ray's sockets; set"
            " RAY_TMPDIR to a shorter folder"
        )
    check_writable(folder, f"{variable}={folder}: the folder for Ray's files")
    if os.path.isdir(SHARED_MEMORY):
        check_writable(SHARED_MEMORY, f"{SHARED_MEMORY}, where Ray keeps objects,")


def create_token() -> None:
    """Create the token of a local Ray, readable by its owner only. A token that Ray creates is readable by all.

    Raises:
        UserError: there is no token, and it cannot be written.
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
    with suppress(OSError):  # it belongs to another user
        token.chmod(0o600)


def _describe_connection_error(error: Exception, address: str) -> str:
    """Describe why a cluster cannot be joined. Ray has one error for a missing cluster and for another token."""
    remedy = "set RAY_AUTH_MODE=token, and the cluster's token as RAY_AUTH_TOKEN or in ~/.ray/auth_token"
    if isinstance(error, AuthenticationError):
        return f"the cluster requires a token, and there is none here; {remedy}"
    if address.rpartition(":")[2].isdigit():
        return f"the cluster answers but refuses this process; {remedy} (or it has another version of Ray)"
    return " ".join(str(error).split())[:300]
