"""A checkpoint as a model in MLflow: volumes and a question in, an answer out."""

import logging
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import MlflowClient, pyfunc
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema

from umbrella.base import UserError, mask_secrets, note
from umbrella.fileio import link_or_copy
from umbrella.paths import SIZES, STATE
from umbrella.tracking.mlflow_logger import MlflowLogger
from umbrella.tracking.settings import TrackingSettings
from umbrella.tracking.store import short
from umbrella.version import __version__, check_version

logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # it says what it does well
CHECKPOINT = "checkpoint"
CHECKPOINT_TAG = "umbrella.checkpoint"
"""Of a logged model: which checkpoint of its run it is."""
LEFT_BEHIND = (STATE, SIZES)
"""What only a training that goes on needs: the optimizer's state is twice as large as all that was trained."""
LIBRARIES = ("torch", "transformers", "peft", "nibabel", "mlflow")
TOKENS = "max_new_tokens"
SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec(AnyType(), "volumes"),  # a path, or a list of paths
            ColSpec(DataType.string, "question"),
            ColSpec(AnyType(), "modality", required=False),  # a name, or a list of names
        ]
    ),
    outputs=Schema([ColSpec(DataType.string, "answer")]),
    params=ParamSchema([ParamSpec(TOKENS, DataType.long, 0)]),
)
EXAMPLE = [{"volumes": ["scan.nii.gz"], "question": "What does this scan show?"}]
"""Shows the form. It names no file that there is, and nobody's."""


class AnsweringModel(PythonModel):
    """What ``mlflow.pyfunc.load_model`` gives: ``predict`` takes records and returns a list of answers.

    A record is ``volumes`` (a path or a list of paths, as the serving machine sees them), ``question`` and, where the
    axes do not tell it, ``modality``. ``model_config`` may have ``device`` and ``dtype``, as in ``from_checkpoint``.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint."""
        from umbrella.inference.model import Umbrella

        config = context.model_config or {}
        self.model = Umbrella.from_checkpoint(
            context.artifacts[CHECKPOINT], device=config.get("device"), dtype=config.get("dtype")
        )

    def predict(self, context: Any, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> list[str]:
        """One answer per record; records are answered side by side.

        Args:
            model_input: a row for each record. MLflow makes it of what it is given: a DataFrame, records, or JSON.
            params: ``max_new_tokens``, see ``Umbrella.answer``; 0 stands for its default.
        """
        asked = []
        for record in model_input.to_dict("records"):
            modality = record.get("modality")
            modality = None if isinstance(modality, float) else modality  # a table has NaN where there is none
            asked.append(self.model.question(record["volumes"], record["question"], modality))
        return self.model.answer(asked, **(params or {}))


def keep_model(settings: TrackingSettings, uri: str, training: Path, checkpoint: str | Path, again: str) -> None:
    """Log a checkpoint, and register it as settings say, unless that was done; what does not work is said, and no more.

    Args:
        training: folder of the training or sweep whose run gets it.
        again: what would try again, in words.
    """
    client, why = MlflowClient(uri), "it was stopped"
    try:
        tracker = MlflowLogger(uri, training)
        tracker.flush()  # its start may wait still
        logged = _logged(client, tracker.run_id, Path(checkpoint))
        if not logged:
            address = log_model(uri, tracker.run_id, checkpoint)
            logged = client.get_logged_model(address.rpartition("/")[2])
        if settings.registered_as and not _is_registered(client, settings.registered_as, logged):
            _register(client, settings.registered_as, logged)
        why = ""
    except Exception as error:  # of whatever library: what was trained weighs more
        why = short(error) or type(error).__name__
    finally:
        if why:
            note(f"{checkpoint} was not logged as a model in MLflow: {why}; {again} logs it")


def log_model(
    uri: str,
    run_id: str,
    checkpoint: str | Path,
    name: str = "model",
    register: str | None = None,
    whole: bool = True,
) -> str:
    """Log a checkpoint as a model of a run, and register it.

    Nothing of MLflow's state in this process changes, and the run may have ended.

    Args:
        checkpoint: see ``Umbrella.from_checkpoint``.
        register: the name of a registered model that this becomes a version of; made when missing.
        whole: of a checkpoint that stands on a base, log all weights, so that the model needs the base no more. False:
            only what was trained; who loads the model needs the base under the name that the checkpoint has for it.

    Returns:
        The model's address, "models:/m-...", as ``mlflow.pyfunc.load_model`` takes it.

    Raises:
        UserError: no such checkpoint, one of a version that is too old, no such run, or MLflow cannot be reached.
    """
    client, folder = MlflowClient(uri), Path(checkpoint).absolute()
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: is no checkpoint: it has no config.json")
    check_version(folder)
    try:
        run = client.get_run(run_id)
        told = {"params": run.data.params, "tags": {CHECKPOINT_TAG: _short_name(folder)}}
        logged = client.create_logged_model(run.info.experiment_id, name, run_id, **told)
    except MlflowException as error:
        raise UserError(f"MLflow at {mask_secrets(uri)}: {short(error)}") from None
    status = "FAILED"
    try:
        with tempfile.TemporaryDirectory() as temporary:
            answering = _gathered(folder, Path(temporary) / CHECKPOINT, whole)
            described = Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id)
            saved = Path(temporary) / "model"
            _save(saved, answering, described)
            client.log_model_artifacts(logged.model_id, str(saved))
        status = "READY"
    finally:
        client.finalize_logged_model(logged.model_id, status)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    if register:
        _register(client, register, logged)
    return str(logged.model_uri)


def _gathered(checkpoint: Path, folder: Path, whole: bool) -> Path:
    """What is logged of a checkpoint, in a folder that is made: its files, or all weights where it has few."""
    from umbrella.model.partial_checkpoint import is_partial

    if whole and is_partial(checkpoint):
        from umbrella.inference.model import Umbrella

        Umbrella.from_checkpoint(checkpoint, device="cpu").save_pretrained(folder)
        return folder
    shutil.copytree(
        checkpoint, folder, ignore=shutil.ignore_patterns(*LEFT_BEHIND), copy_function=link_or_copy
    )  # MLflow copies twice
    return folder


def _save(folder: Path, checkpoint: Path, described: Model) -> None:
    needed = [f"umbrella-mri=={__version__}", *(f"{name}=={version(name).split('+')[0]}" for name in LIBRARIES)]
    pyfunc.save_model(
        folder,
        python_model=str(Path(__file__).with_name("served.py")),
        artifacts={CHECKPOINT: str(checkpoint)},
        signature=SIGNATURE,
        input_example=EXAMPLE,
        pip_requirements=needed,
        mlflow_model=described,
    )


def _logged(client: MlflowClient, run_id: str, checkpoint: Path) -> LoggedModel | None:
    """The whole model that a run has of a checkpoint."""
    experiment, wanted = client.get_run(run_id).info.experiment_id, (LoggedModelStatus.READY, _short_name(checkpoint))
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    return next((model for model in found if (model.status, model.tags.get(CHECKPOINT_TAG)) == wanted), None)


def _short_name(checkpoint: Path) -> str:
    """Tells a checkpoint from the others of its training or sweep, wherever that lies."""
    return "/".join(checkpoint.absolute().parts[-2:])


def _is_registered(client: MlflowClient, name: str, model: LoggedModel) -> bool:
    versions = client.search_model_versions(f"run_id = '{model.source_run_id}'")
    return any(version.name == name and version.source == model.artifact_location for version in versions)


def _register(client: MlflowClient, name: str, model: LoggedModel) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise UserError(f"MLflow cannot register a model as {name!r}: {error}") from None
    # By where it lies: its address would be looked up in whatever store this process has set for itself.
    client.create_model_version(name, model.artifact_location, model.source_run_id, model_id=model.model_id)
