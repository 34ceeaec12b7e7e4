"""Settings of what MLflow holds."""

from typing import Literal

from pydantic import Field, field_validator

from umbrella.base import Section, reject_secrets


class TrackingSettings(Section):
    """What is kept of a run in MLflow, and where."""

    uri: str = ""
    """Address of an MLflow server. Empty: MLFLOW_TRACKING_URI if it is set, else a database in the storage folder."""
    checkpoint: Literal["none", "location", "best"] = "location"
    """What MLflow gets of the best checkpoint: nothing, its place as a tag, or also its files, uploaded at the end."""
    model: bool = True
    """The best checkpoint of a sweep or training is logged as a model that answers questions, with all its weights."""
    registered_as: str = ""
    """Name of a registered model in MLflow that it becomes a version of."""
    predictions: int = Field(100, ge=0)
    """Validation questions in predictions.json, the same in every run on the same data. 0: no such table."""
    hash_subjects: bool = False
    """Subject ids in MLflow's files are hashed, with a salt that stays in the storage folder."""

    @field_validator("uri")
    @classmethod
    def _holds_no_secret(cls, uri: str) -> str:
        return reject_secrets(
            uri,
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, or set"
            " MLFLOW_TRACKING_URI instead",
        )
