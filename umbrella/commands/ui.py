"""Start MLflow's web interface on localhost, and print the address of the runs of the newest sweep."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

from umbrella.base import UserError, mask_secrets
from umbrella.cli import Arguments, run_command

OPTIONS = {
    "--port": {"help": "port of MLflow's web interface on localhost", "default": 5000, "type": int, "metavar": "PORT"},
}


def main(args: Arguments) -> None:
    """Serve the MLflow database of the storage folder until Ctrl-C, or print the address of the MLflow server."""
    from umbrella.tracking.store import open_experiment, runs_page, tracking_uri

    settings, port = args.settings, args.options["port"]
    storage = Path(settings.resources.storage)
    uri = tracking_uri(storage, settings.tracking.uri)
    served = uri.startswith(("http:", "https:"))
    server = mask_secrets(uri) if served else f"http://127.0.0.1:{port}"
    if args.dry_run:
        print(f"would open {server}")
        return
    page = runs_page(uri, open_experiment(uri, settings.experiment, storage), server)
    if served:
        print(page)
    else:
        _serve(uri, port, storage / "mlflow_server.log", page)


def _serve(uri: str, port: int, log: Path, page: str) -> None:
    """Run MLflow's server until it ends or is interrupted; print ``page`` when it answers."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"port {port} is in use, maybe by another MLflow; choose another one: --port {port + 1}")
    print(f"log of MLflow's server: {log}", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        # In a session of its own, which is ended as a whole: the server starts further processes.
        server = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        while server.poll() is None:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.2)
        else:
            end = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-300:]
            raise UserError(f"MLflow's server does not start; {log} ends with: {end}")
        print(page, flush=True)
        server.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("ui", argv, main, __doc__, options=OPTIONS)
