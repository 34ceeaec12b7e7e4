"""Settings of what MLflow holds."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from umbrella.base import Section


class TrackingSettings(Section):
    """What is kept of a run in MLflow, and where."""

    uri: str = ""
    """Address of an MLflow server. Empty: MLFLOW_TRACKING_URI if it is set, else a database in the storage folder."""
    checkpoint: Literal["none", "location", "best"] = "location"
    """What MLflow gets of the best checkpoint: nothing, its place as a tag, or also its files, uploaded at the end."""
    predictions: int = Field(100, ge=0)
    """Validation questions in predictions.json, the same in every run on the same data. 0: no such table."""
    hash_subjects: bool = False
    """Subject ids in MLflow's files are hashed, with a salt that stays in the storage folder."""

    @field_validator("uri")
    @classmethod
    def _holds_no_password(cls, uri: str) -> str:
        if urlsplit(uri).password is not None:  # settings are printed, and stored with every checkpoint
            raise ValueError(
                "settings are written to many places, so they hold no password; leave it out and set"
                " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or set MLFLOW_TRACKING_URI instead"
            )
        return uri
