"""Logging to MLflow. No other package imports mlflow."""

import os

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The client gives up after 31 s. With MLflow's defaults it retries for 15 minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
"""Options that MLflow reads at import. Variables that are already set keep their values."""
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
