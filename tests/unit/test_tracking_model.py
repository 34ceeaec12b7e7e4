"""Checkpoints as models in MLflow: logged, registered, and loaded by MLflow in another process."""

import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from nibabel import Nifti1Image

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation
from umbrella.inference.model import Umbrella
from umbrella.tracking.mlflow_logger import MlflowLogger
from umbrella.tracking.model_registry import PyfuncModel, log_best_model, log_model
from umbrella.tracking.settings import TrackingSettings
from umbrella.tracking.store import open_experiment

FRESH = """
import json, sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
import pandas as pd
records = json.loads(sys.argv[3])
model = mlflow.pyfunc.load_model(sys.argv[2], model_config={"device": "cpu"})
print(json.dumps([model.predict(given, params={"max_new_tokens": 6}) for given in (pd.DataFrame(records), records)]))
"""


@pytest.fixture(scope="module")
def uri(mlflow_store: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return mlflow_store(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(scope="module")
def run_id(uri: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run that has ended, as those of a sweep have."""
    experiment = open_experiment(uri, "models", Path(uri.removeprefix("sqlite:///")).parent)
    tracker = MlflowLogger.start(uri, experiment, "best", folder=tmp_path_factory.mktemp("best"))
    tracker.params({"optim.lr": 0.01})
    tracker.end()
    return tracker.run_id


@pytest.fixture(scope="module")
def save(build: Callable[..., Any], save_model: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a checkpoint of a model that answers at random, as a training does."""

    def write(folder: Path, **options: Any) -> Path:
        model = build(**options)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.normal_(std=0.4)
        return save_model(folder, model, **{f"model.{name}": value for name, value in options.items()})

    return write


def logged_folder(uri: str, address: str) -> Path:
    logged = MlflowClient(uri).get_logged_model(address.removeprefix("models:/"))
    return Path(logged.artifact_location.removeprefix("file://"))


def test_a_registered_model_answers_in_a_fresh_process_as_the_checkpoint_does(
    uri: str, run_id: str, save: Callable[..., Path], cohort: dict[str, Conversation], tmp_path: Path
) -> None:
    s, d, f = (volume.image_path for volume in cohort["three"].volumes)
    records: list[dict[str, Any]] = [
        {"volumes": s, "question": "Sex?", "modality": "sMRI"},
        {"volumes": [f, f], "question": "Which of them?"},
        {"volumes": [s, d], "question": "Age?", "modality": ["sMRI", "dMRI"]},
        {"volumes": [], "question": "Who are you?"},
    ]
    step = save(tmp_path / "run")
    model = Umbrella.from_checkpoint(step, device="cpu")
    questions = [model.question(r["volumes"], r["question"], r.get("modality")) for r in records]
    records.append({"question": "Sex?", "modality": "sMRI", "nifti": b64encode(Path(s).read_bytes()).decode()})
    expected = model.answer([*questions, questions[0]], max_new_tokens=6)
    assert len(set(expected)) > 2

    before = mlflow.get_tracking_uri()
    address = log_model(uri, run_id, step, register="brains")
    assert log_model(uri, run_id, step, register="brains") != address
    assert mlflow.get_tracking_uri() == before
    assert mlflow.active_run() is None
    step.rename(tmp_path / "gone")
    command = [sys.executable, "-c", FRESH, uri, "models:/brains/1", json.dumps(records)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [expected, expected]

    client = MlflowClient(uri)
    assert [int(v.version) for v in client.search_model_versions("name = 'brains'")] == [2, 1]
    run = client.get_run(run_id)
    assert (run.info.status, len(run.outputs.model_outputs)) == ("FINISHED", 2)
    logged = client.get_logged_model(address.removeprefix("models:/"))
    assert (logged.name, logged.status, logged.params) == ("model", "READY", {"optim.lr": "0.01"})
    folder = logged_folder(uri, address)
    assert {file.name for file in (folder / "artifacts/checkpoint").iterdir()} >= {"model.safetensors", "config.json"}
    assert not list(folder.rglob("state.pt")), "the optimizer state"
    assert "umbrella-mri==" in (folder / "requirements.txt").read_text()
    first, second = json.loads((folder / "serving_input_example.json").read_text())["inputs"]
    assert first["volumes"] == ["scan.nii.gz"]
    assert Nifti1Image.from_bytes(b64decode(second["nifti"][0])).shape == (2, 2, 2)


@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_of_trained_weights_is_logged_with_its_base_model_or_refers_to_it(
    uri: str,
    run_id: str,
    save: Callable[..., Path],
    save_llava: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    whole: bool,
) -> None:
    save_llava(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    step = save(tmp_path / "run", checkpoint=str(tmp_path / "base"), train="embedder+lora", lora_rank=2)
    expected = Umbrella.from_checkpoint(step, device="cpu").score([], "Sex?", ["male.", "female."])
    checkpoint = logged_folder(uri, log_model(uri, run_id, step, whole=whole)) / "artifacts" / "checkpoint"
    assert (checkpoint / "base.json").exists() != whole
    if whole:
        (tmp_path / "base").rename(tmp_path / "gone")
    loaded = PyfuncModel()
    loaded.load_context(SimpleNamespace(artifacts={"checkpoint": str(checkpoint)}, model_config={"device": "cpu"}))
    assert loaded.model.score([], "Sex?", ["male.", "female."]) == pytest.approx(expected, abs=1e-6)


def test_a_best_checkpoint_is_logged_and_registered_once_even_if_its_training_is_resumed(
    mlflow_store: Callable[[Path], str], save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    uri, folder = mlflow_store(tmp_path), tmp_path / "trainings" / "night"
    tracker = MlflowLogger.start(uri, open_experiment(uri, "x", tmp_path), "night", folder=folder)
    client, models = MlflowClient(uri), tmp_path / "artifacts" / "models"

    def keep(checkpoint: Path, name: str = "") -> tuple[int, int]:
        log_best_model(TrackingSettings(registered_as=name), uri, folder, checkpoint, "the same command")
        versions = client.search_model_versions(f"run_id = '{tracker.run_id}'")
        return len(client.get_run(tracker.run_id).outputs.model_outputs), len(versions)

    first = save(folder)
    models.parent.mkdir()
    models.write_text("in the way", encoding="utf-8")
    assert keep(first) == (0, 0)
    expected = f"note: {first} was not logged as a model in MLflow: .*Not a directory.*; the same command logs it\n"
    assert re.fullmatch(expected, capsys.readouterr().err)
    models.unlink()
    assert keep(first) == keep(first) == (1, 0)
    [of_first] = client.get_run(tracker.run_id).outputs.model_outputs
    assert keep(first, "brains") == keep(first, "brains") == (1, 1)
    second = first.with_name("step_0000002")
    shutil.copytree(first, second)
    assert keep(second, "brains") == (2, 2)
    client.delete_logged_model(of_first.model_id)
    assert keep(first, "brains") == (3, 3), "a deleted model is logged again"
    assert capsys.readouterr().err == ""


def test_a_missing_checkpoint_or_run_is_named_and_leaves_no_model(
    uri: str, run_id: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    client = MlflowClient(uri)
    experiment = client.get_run(run_id).info.experiment_id
    before = len(client.search_logged_models([experiment]))
    with pytest.raises(UserError, match=r"nowhere: is no checkpoint"):
        log_model(uri, run_id, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^MLflow at sqlite:.*: .*f{32}"):
        log_model(uri, "f" * 32, save(tmp_path / "run"))
    assert len(client.search_logged_models([experiment])) == before
