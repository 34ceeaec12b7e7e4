"""The code of a model in MLflow: a copy of this file lies in each, and runs wherever it is loaded."""

from mlflow.models import set_model

from umbrella.tracking.model_registry import AnsweringModel

set_model(AnsweringModel())
