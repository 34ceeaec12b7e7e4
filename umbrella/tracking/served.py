"""Code of the logged models. MLflow copies this file into each model and runs it when the model is loaded."""

from mlflow.models import set_model

from umbrella.tracking.model_registry import PyfuncModel

set_model(PyfuncModel())
