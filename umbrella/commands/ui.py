"""Start MLflow's web interface on localhost, and print its address and that of the Ray dashboard."""

import os
import sys
from collections.abc import Sequence
from urllib.request import urlopen

from umbrella.base import mask_secrets
from umbrella.cli import Arguments, run_command

OPTIONS = {
    "--port": {"help": "port of MLflow's web interface on localhost", "default": 5000, "type": int, "metavar": "PORT"},
}
DASHBOARD = "http://127.0.0.1:8265"


def main(args: Arguments) -> None:
    """Serve the MLflow database of the storage folder until Ctrl-C, or print the address of the MLflow server."""
    from umbrella.tracking.store import open_experiment, page_urls, tracking_uri

    settings, port = args.settings, args.options["port"]
    storage = settings.resources.storage
    uri = tracking_uri(storage, settings.tracking.uri)
    served = uri.startswith(("http:", "https:"))
    page = mask_secrets(uri) if served else f"http://127.0.0.1:{port}"
    print(f"MLflow: {page}", flush=True)
    print(f"Ray dashboard: {_dashboard()}", flush=True)
    if args.dry_run:
        return
    experiment = open_experiment(uri, settings.experiment, storage)
    for what, address in page_urls(uri, experiment, page, settings.tune.metric, settings.tune.mode).items():
        print(f"{what}: {address}", flush=True)
    if not served:
        server = f"-m mlflow server --workers 1 --host 127.0.0.1 --port {port} --backend-store-uri".split()
        os.execv(sys.executable, [sys.executable, *server, uri])


def _dashboard() -> str:
    """Address of the Ray dashboard, or a note that there is none."""
    try:
        with urlopen(DASHBOARD, timeout=1):
            return DASHBOARD
    except OSError:
        return f"none runs; a training or sweep on this machine opens it at {DASHBOARD} and prints its address"


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("ui", argv, main, __doc__, options=OPTIONS)
