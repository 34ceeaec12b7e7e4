"""MLflow: what a run holds, and where. The only package that imports mlflow."""

import os

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The client gives up after 31 s. Its own defaults retry for a quarter of an hour.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
"""Options of MLflow, which it reads when it is imported. Variables that are set already stay."""
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
