"""Settings of MLflow."""

from typing import Literal

from pydantic import Field, field_validator

from umbrella.base import Section, reject_secrets


class TrackingSettings(Section):
    """What is logged to MLflow, and where."""

    uri: str = ""
    """Address of an MLflow server. Empty: MLFLOW_TRACKING_URI if it is set, else a database in the storage folder."""
    checkpoint: Literal["none", "location", "best"] = "location"
    """How the best checkpoint is recorded in MLflow: not at all, its location as a tag, or also its files, uploaded at the end."""  # noqa: E501
    model: bool = True
    """Log the best checkpoint of a training or sweep as an MLflow model, with all its weights."""
    registered_as: str = ""
    """Registered model in MLflow of which the logged model becomes a version. Empty: it is not registered."""
    predictions: int = Field(100, ge=0)
    """Number of validation samples in predictions.json, the same ones in every run on the same data. 0: no such file."""  # noqa: E501
    hash_subjects: bool = False
    """Replace subject ids in MLflow's files by hashes, with a salt that stays in the storage folder."""

    @field_validator("uri")
    @classmethod
    def _holds_no_secret(cls, uri: str) -> str:
        return reject_secrets(
            uri,
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, or set"
            " MLFLOW_TRACKING_URI instead",
        )
