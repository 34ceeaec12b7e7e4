"""Log checkpoints as MLflow models, which answer questions about volumes, and register them."""

import base64
import logging
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
from mlflow import MlflowClient, pyfunc
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema

from umbrella.base import UserError, mask_secrets, note
from umbrella.conversations.schema import Conversation
from umbrella.fileio import link_or_copy
from umbrella.paths import SIZES, STATE
from umbrella.tracking.mlflow_logger import MlflowLogger
from umbrella.tracking.settings import TrackingSettings
from umbrella.tracking.store import describe_error
from umbrella.version import __version__, check_version

logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # it also logs success
CHECKPOINT = "checkpoint"
CHECKPOINT_TAG = "umbrella.checkpoint"
"""Tag of a logged model: its checkpoint."""
TRAINING_FILES = (STATE, SIZES)
"""Files that only resuming needs; they are not logged. The optimizer state is twice as large as the trained weights."""
LIBRARIES = ("torch", "transformers", "peft", "nibabel", "mlflow")
TOKENS = "max_new_tokens"
SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec(DataType.string, "question"),
            ColSpec(AnyType(), "volumes", required=False),  # a path, or a list of paths
            # Bytes of a file, or a list of them. Not of type binary: MLflow then requires them in every record.
            ColSpec(AnyType(), "nifti", required=False),
            ColSpec(AnyType(), "modality", required=False),  # a name, or a list of names
        ]
    ),
    outputs=Schema([ColSpec(DataType.string, "answer")]),
    params=ParamSchema([ParamSpec(TOKENS, DataType.long, 0)]),
)
SCAN = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
EXAMPLE = [
    {"question": "What does this scan show?", "volumes": ["scan.nii.gz"]},
    {"question": "What does this scan show?", "nifti": [SCAN.to_bytes()]},
]
"""Example of the input format; scan.nii.gz does not exist."""


class PyfuncModel(PythonModel):
    """The model that ``mlflow.pyfunc.load_model`` returns. ``predict`` takes records and returns a list of answers.

    A record has ``question``; ``volumes``, a path or a list of paths on the serving machine; ``nifti``, the bytes of a
    NIfTI file (plain or gzip) or a list of them, which come after ``volumes``, as Base64 in JSON; and, unless the axes
    of the volumes determine it, ``modality``. ``model_config`` may contain ``device`` and ``dtype``, see
    ``Umbrella.from_checkpoint``.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint."""
        from umbrella.inference.model import Umbrella

        config = context.model_config or {}
        self.model = Umbrella.from_checkpoint(
            context.artifacts[CHECKPOINT], device=config.get("device"), dtype=config.get("dtype")
        )

    def predict(self, context: Any, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> list[str]:
        """Return one answer per record. Records are answered in one batch.

        Args:
            model_input: one row per record. MLflow converts a DataFrame, records or JSON to it.
            params: ``max_new_tokens``, see ``Umbrella.answer``; 0 is its default.

        Raises:
            MlflowException: a volume cannot be used. MLflow's server answers with status 400.
        """
        with tempfile.TemporaryDirectory() as folder:
            try:
                records = enumerate(model_input.to_dict("records"))
                questions = [self._question(record, Path(folder), f"record_{i}") for i, record in records]
                return self.model.answer(questions, **(params or {}))
            except UserError as error:
                raise MlflowException.invalid_parameter_value(str(error).replace(f"{folder}/", "")) from None

    def _question(self, record: Mapping[str, Any], folder: Path, name: str) -> Conversation:
        """Make the conversation of a record. Volumes that it contains become files ``<name>_nifti_<number>``."""
        given = {key: value for key, value in record.items() if not isinstance(value, float)}  # NaN if missing
        volumes, contents = (
            value if isinstance(value, list) else [value]
            for value in (given.get("volumes") or [], given.get("nifti") or [])
        )
        if not all(isinstance(path, str | Path) for path in volumes):
            raise UserError(f"{name}: volumes={volumes!r}: give a path, or a list of paths")
        files = []
        for number, content in enumerate(contents):
            try:
                content = content if isinstance(content, bytes) else base64.b64decode(content)
            except (TypeError, ValueError):
                raise UserError(f"{name}: nifti: give the Base64 text of a file, or a list of such texts") from None
            is_gzip = content.startswith(b"\x1f\x8b")
            files.append(folder / f"{name}_nifti_{number}.nii{'.gz' if is_gzip else ''}")
            files[-1].write_bytes(content)
        return self.model.question([*volumes, *files], given["question"], given.get("modality"))


def log_best_model(settings: TrackingSettings, uri: str, training: Path, checkpoint: str | Path, again: str) -> None:
    """Log and register a checkpoint unless this was done before. Errors are printed as a note and not raised.

    Args:
        training: folder of the training or sweep to whose run the model is logged.
        again: how the user can try again, for the note.
    """
    client, name, reason = MlflowClient(uri), settings.registered_as, "it was stopped"
    try:
        tracker = MlflowLogger(uri, training)
        tracker.flush()  # the run may not have been created yet
        models = client.search_logged_models([tracker.experiment], f"source_run_id = '{tracker.run_id}'")
        wanted = (LoggedModelStatus.READY, _short_name(Path(checkpoint)))
        logged = next((model for model in models if (model.status, model.tags.get(CHECKPOINT_TAG)) == wanted), None)
        if not logged:
            address = log_model(uri, tracker.run_id, checkpoint)
            logged = client.get_logged_model(address.rpartition("/")[2])
        versions = client.search_model_versions(f"run_id = '{tracker.run_id}'")
        if name and not any((v.name, v.source) == (name, logged.artifact_location) for v in versions):
            _register(client, name, logged)
        reason = ""
    except Exception as error:  # no error of any library may end a finished training
        reason = describe_error(error) or type(error).__name__
    finally:
        if reason:
            note(f"{checkpoint} was not logged as a model in MLflow: {reason}; {again} logs it")


def log_model(
    uri: str,
    run_id: str,
    checkpoint: str | Path,
    name: str = "model",
    register: str | None = None,
    whole: bool = True,
) -> str:
    """Log a checkpoint as a model of a run, and register it.

    MLflow's global state in this process does not change. The run may have ended.

    Args:
        checkpoint: see ``Umbrella.from_checkpoint``.
        register: name of a registered model, of which this becomes a version; created if it does not exist.
        whole: if the checkpoint holds only trained weights, log the weights of its base model, too. False: the base
            model is needed to load the model, under the name that the checkpoint has for it.

    Returns:
        URI of the model for ``mlflow.pyfunc.load_model``, "models:/m-...".

    Raises:
        UserError: the checkpoint or run does not exist, the checkpoint has an old version, or MLflow cannot be reached.
    """
    client, folder = MlflowClient(uri), Path(checkpoint).absolute()
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: is no checkpoint: it has no config.json")
    check_version(folder)
    try:
        run = client.get_run(run_id)
        tags = {CHECKPOINT_TAG: _short_name(folder)}
        logged = client.create_logged_model(run.info.experiment_id, name, run_id, tags, run.data.params)
    except MlflowException as error:
        raise UserError(f"MLflow at {mask_secrets(uri)}: {describe_error(error)}") from None
    status = "FAILED"
    try:
        with tempfile.TemporaryDirectory() as temporary:
            exported, saved = Path(temporary) / CHECKPOINT, Path(temporary) / "model"
            _export(folder, exported, whole)
            pyfunc.save_model(
                saved,
                python_model=str(Path(__file__).with_name("served.py")),
                artifacts={CHECKPOINT: str(exported)},
                signature=SIGNATURE,
                input_example=EXAMPLE,
                pip_requirements=[
                    f"umbrella-mri=={__version__}",
                    *(f"{library}=={version(library).split('+')[0]}" for library in LIBRARIES),
                ],
                mlflow_model=Model(logged.artifact_location, run_id, model_id=logged.model_id),
            )
            client.log_model_artifacts(logged.model_id, str(saved))
        status = "READY"
    finally:
        client.finalize_logged_model(logged.model_id, status)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    if register:
        _register(client, register, logged)
    return str(logged.model_uri)


def _export(checkpoint: Path, folder: Path, whole: bool) -> None:
    """Copy the files of a checkpoint to log to a new folder; with ``whole``, add the weights of the base model."""
    from umbrella.models.partial_checkpoint import is_partial

    if whole and is_partial(checkpoint):
        from umbrella.inference.model import Umbrella

        Umbrella.from_checkpoint(checkpoint, device="cpu").save_pretrained(folder)
    else:
        ignored = shutil.ignore_patterns(*TRAINING_FILES)
        shutil.copytree(checkpoint, folder, ignore=ignored, copy_function=link_or_copy)  # MLflow copies twice


def _short_name(checkpoint: Path) -> str:
    """Name of a checkpoint that is unique in its training or sweep, and the same if the folder is moved."""
    return "/".join(checkpoint.absolute().parts[-2:])


def _register(client: MlflowClient, name: str, model: LoggedModel) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise UserError(f"MLflow cannot register a model as {name!r}: {error}") from None
    # By its location: MLflow looks a URI up in the default store of this process, which may be another one.
    client.create_model_version(name, model.artifact_location, model.source_run_id, model_id=model.model_id)
