"""MLflow's store: its address, its errors, valid names, experiments, and links to its web interface."""

import hashlib
import logging
import os
import posixpath
import re
import shlex
import sqlite3
from pathlib import Path
from urllib.parse import quote, unquote, urlencode, urlsplit
from urllib.request import url2pathname

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from umbrella.base import UserError, mask_secrets, note
from umbrella.paths import ARTIFACTS, DATABASE

logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # logs the errors that it raises
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # logs each retry

SWEEP = "umbrella.sweep"
"""Tag with the name of a sweep, of its run and those of its trials."""
METRIC, MODE = "tune.metric", "tune.mode"
"""Parameters of the run of a sweep."""


def tracking_uri(storage: str | Path, uri: str = "") -> str:
    """Return the tracking URI: ``uri``, else ``MLFLOW_TRACKING_URI``, else an SQLite file in the storage folder.

    User name and password are moved from the URI to the environment variables of MLflow, which are never printed.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(storage).absolute() / DATABASE}"
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.username and parts.password:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
        uri = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return uri


def describe_error(error: BaseException) -> str:
    """Return the message of an error in one line of at most 300 characters, without credentials."""
    return mask_secrets(" ".join(str(error)[:3000].split()))[:300]


def is_sqlite(uri: str) -> bool:
    """Whether the store is an SQLite file."""
    return uri.startswith("sqlite:")


def store_id(uri: str) -> str:
    """Return a name of a store for use in a file name. All SQLite files have the same one, since they may be moved."""
    return "sqlite" if is_sqlite(uri) else "server-" + hashlib.sha256(mask_secrets(uri).encode()).hexdigest()[:8]


def is_temporary(error: Exception, uri: str) -> bool:
    """Whether a request may succeed later: no answer, an overloaded server, wrong credentials, a locked database."""
    if is_sqlite(uri):
        return "is locked" in str(error)
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in (401, 403, 408, 429)
    return type(error).__module__ != "builtins"  # raised by a library that connects to the server or its artifact store


def is_valid_metric(name: str) -> bool:
    """Whether MLflow accepts a metric of this name."""
    return re.fullmatch(r"[\w\-. :/]{1,250}", name) is not None and posixpath.normpath(name) == name


def is_active(client: MlflowClient, run_id: str) -> bool:
    """Whether the store has a run that was not deleted."""
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def open_experiment(uri: str, name: str, storage: str | Path) -> str:
    """Return the id of an experiment; create it if it does not exist.

    Call it in the driver, before any worker opens the database.

    Raises:
        UserError: the store cannot be reached, or the experiment was deleted there.
    """
    folder = Path(storage).absolute() / ARTIFACTS
    try:
        client = MlflowClient(uri)
        artifacts = folder.as_uri() if is_sqlite(uri) else None
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            return client.create_experiment(name, artifact_location=artifacts)
    except (MlflowException, SQLAlchemyError, sqlite3.Error, ImportError) as error:
        remedy = "" if is_sqlite(uri) else "; start it, or name another one: tracking.uri=..."
        raise UserError(f"MLflow at {mask_secrets(uri)}: {describe_error(error)}{remedy}") from None
    if experiment.lifecycle_stage != "active":
        raise UserError(f"MLflow experiment {name!r} was deleted; restore it, or choose another name: experiment=...")
    if artifacts and not _is_same_folder(experiment.artifact_location, artifacts):
        note(
            f"the storage was moved, and MLflow keeps the artifacts of experiment {name!r} at their old address,"
            f" {mask_secrets(experiment.artifact_location)}; link that folder to {folder},"
            " or choose another name: experiment=..."
        )
    return experiment.experiment_id


def _is_same_folder(address: str, other: str) -> bool:
    """Whether two addresses are the same folder, also through symbolic links."""
    first, second = (Path(url2pathname(urlsplit(one).path)) for one in (address, other))
    return not address.startswith("file:") or first.resolve() == second.resolve()


def ui_command(uri: str, storage: Path) -> str:
    """Return the command that opens MLflow's pages of a storage folder, or the address of MLflow's server."""
    if not is_sqlite(uri):
        return mask_secrets(uri)
    setting = "" if storage.absolute() == Path("runs").absolute() else f"resources.storage={storage}"
    if uri != tracking_uri(storage):
        setting = f"tracking.uri={uri}"
    return f"umbrella ui {shlex.quote(setting)}" if setting else "umbrella ui"


def runs_page(uri: str, experiment: str, server: str) -> str:
    """Return the URL of MLflow's page of the newest sweep and its trials, best first; of all runs without a sweep.

    Args:
        experiment: id of the experiment.
        server: URL of MLflow's server.
    """
    page = f"{server}/#/experiments/{experiment}/runs"
    query = {"workflowType": "machine_learning"}  # otherwise MLflow opens its view for chats and prompts
    sweeps = f"tags.`{SWEEP}` LIKE '%' AND params.`{METRIC}` LIKE '%'"  # trials do not have this parameter
    if newest := MlflowClient(uri).search_runs([experiment], sweeps, max_results=1):
        params, name = newest[0].data.params, newest[0].data.tags[SWEEP]
        query["searchFilter"] = f"tags.`{SWEEP}` = '{name}'"
        query |= {"orderByKey": f"metrics.`best/{params[METRIC]}`", "orderByAsc": str(params[MODE] == "min").lower()}
    return f"{page}?{urlencode(query, quote_via=quote)}"
