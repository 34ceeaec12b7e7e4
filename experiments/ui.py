"""Open MLflow's page on localhost, and say where it and the Ray dashboard are."""

import os
import sys

from umbrella.cli import Request, run_script

PORT = "5000"


def main(request: Request) -> None:
    """Serve the storage folder's MLflow database until the keyboard stops it."""
    from umbrella.tracking.runs import open_experiment, tracking_uri

    storage = request.settings.resources.storage
    uri = tracking_uri(storage)
    print(f"MLflow: http://127.0.0.1:{PORT}   Ray dashboard, while a run goes on: http://127.0.0.1:8265", flush=True)
    if request.dry_run:
        return
    if uri.startswith("sqlite:"):
        open_experiment(uri, request.settings.experiment, storage)
    server = f"-m mlflow server --host 127.0.0.1 --port {PORT} --backend-store-uri".split()
    os.execv(sys.executable, [sys.executable, *server, uri])


if __name__ == "__main__":
    run_script(main, __doc__)
