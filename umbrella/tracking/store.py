"""Where runs are kept: MLflow's store by its address, and what its errors mean."""

import hashlib
import logging
import os
import posixpath
import re
import sqlite3
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from umbrella.base import UserError, mask_secrets
from umbrella.fileio import describe_storage_error
from umbrella.paths import artifacts_folder, mlflow_database

logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs, at length, what it raises as well
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each try


def tracking_uri(storage: str | Path, uri: str = "") -> str:
    """Where runs are kept: ``uri``, else ``MLFLOW_TRACKING_URI``, else an SQLite file in the storage folder.

    A server's user and password go from the address into the environment of this process and of those that it starts,
    where MLflow looks for them and nothing prints them.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{mlflow_database(storage)}"
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.username and parts.password:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
        uri = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return uri


def short(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters without credentials."""
    return mask_secrets(" ".join(str(error)[:3000].split()))[:300]


def is_local(uri: str) -> bool:
    """Whether runs are kept in a file of this storage."""
    return uri.startswith("sqlite:")


def store_key(uri: str) -> str:
    """A short name for a store, good for a file's; every SQLite file has the same, since it may be moved."""
    return "sqlite" if is_local(uri) else "server-" + hashlib.sha256(mask_secrets(uri).encode()).hexdigest()[:8]


def can_wait(error: Exception, uri: str) -> bool:
    """Whether what failed may well work later, as it is: no answer, an overloaded server, wrong credentials, a lock."""
    if is_local(uri):
        return "is locked" in str(error)
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in (401, 403, 408, 429)
    return type(error).__module__ != "builtins"  # of a library that talks to the server, or to where its files lie


def is_refusal(error: Exception, uri: str) -> bool:
    """Whether the store is there and does not take it: a deleted run, a name that is not allowed."""
    return (
        isinstance(error, MlflowException) and error.get_http_status_code() < 500 and not describe_storage_error(error)
    )


def is_name(target: str) -> bool:
    """Whether MLflow accepts metrics whose names contain this target."""
    return is_metric(f"eval/{target}/balanced_accuracy")


def is_metric(name: str) -> bool:
    """Whether MLflow accepts a metric of this name."""
    return re.fullmatch(r"[\w\-. :/]{1,250}", name) is not None and posixpath.normpath(name) == name


def open_experiment(uri: str, name: str, storage: str | Path) -> str:
    """The experiment's id, made when missing. To be called in the driver, before any worker opens the database.

    Raises:
        UserError: the store cannot be reached, or the experiment was deleted there.
    """
    try:
        client = MlflowClient(uri)
        artifacts = artifacts_folder(storage).as_uri() if is_local(uri) else None
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            return client.create_experiment(name, artifact_location=artifacts)
    except (MlflowException, SQLAlchemyError, sqlite3.Error, ImportError) as error:
        remedy = "" if is_local(uri) else "; start it, or name another one: tracking.uri=..."
        raise UserError(f"MLflow at {mask_secrets(uri)}: {short(error)}{remedy}") from None
    if experiment.lifecycle_stage != "active":
        raise UserError(f"MLflow experiment {name!r} was deleted; restore it, or choose another name: experiment=...")
    if artifacts and not _same_place(experiment.artifact_location, artifacts):
        print(
            f"note: the storage was moved, and MLflow keeps the artifacts of experiment {name!r} at their old address,"
            f" {mask_secrets(experiment.artifact_location)}; link that folder to"
            f" {Path(storage).absolute() / 'artifacts'}, or choose another name: experiment=...",
            file=sys.stderr,
        )
    return experiment.experiment_id


def _same_place(address: str, other: str) -> bool:
    """Whether two addresses are the same folder, which a link may have two names of."""
    first, second = (Path(url2pathname(urlsplit(one).path)) for one in (address, other))
    return not address.startswith("file:") or first.resolve() == second.resolve()
