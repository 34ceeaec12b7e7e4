"""A checkpoint as a model in MLflow: loaded by MLflow alone, in a process of its own, it answers as it does here."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from umbrella.base import UserError
from umbrella.conversations.conversation import Conversation
from umbrella.evaluation.answering import Umbrella
from umbrella.modality import Modality
from umbrella.tracking.model import EXAMPLE, AnsweringModel, log_model
from umbrella.tracking.runs import Tracker
from umbrella.tracking.store import open_experiment, tracking_uri
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.settings import OptimSettings

OPTIM = OptimSettings(lr=1e-2)
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
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking_uri(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(scope="module")
def run_id(uri: str) -> str:
    """A run that has ended, as those of a sweep have."""
    tracker = Tracker.start(uri, open_experiment(uri, "answering", Path(uri.removeprefix("sqlite:///")).parent), "best")
    tracker.params({"optim.lr": 0.01})
    tracker.end()
    return tracker.run_id


@pytest.fixture(scope="module")
def save(
    build: Callable[..., Any], save_step: Callable[..., Path], modalities: dict[str, Modality]
) -> Callable[..., Path]:
    """Writes a checkpoint of a model that answers at random, as a training does."""

    def write(folder: Path, **options: Any) -> Path:
        model = build(**options)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.normal_(std=0.4)
        optimizer = build_optimizer(model, OPTIM)
        training = SimpleNamespace(model=model, optimizer=optimizer, schedule=build_schedule(optimizer, OPTIM, 9))
        kinds = {f"modalities.{name}": modality.model_dump(mode="json") for name, modality in modalities.items()}
        return save_step(folder, training, 1, **kinds, **{f"model.{name}": value for name, value in options.items()})

    return write


@pytest.fixture
def records(cohort: dict[str, Conversation]) -> list[dict[str, Any]]:
    """One path, several, and none; a modality that is told, that is left out, and one for each volume."""
    s, d, f = (volume.image_path for volume in cohort["three"].volumes)
    return [
        {"volumes": s, "question": "Sex?", "modality": "sMRI"},
        {"volumes": [f, f], "question": "Which of them?"},
        {"volumes": [s, d], "question": "Age?", "modality": ["sMRI", "dMRI"]},
        {"volumes": [], "question": "Who are you?"},
    ]


def test_a_registered_model_answers_in_a_fresh_process_as_the_checkpoint_does(
    uri: str, run_id: str, save: Callable[..., Path], records: list[dict[str, Any]], tmp_path: Path
) -> None:
    step = save(tmp_path / "run")
    model = Umbrella.from_checkpoint(step, device="cpu")
    asked = [model.question(r["volumes"], r["question"], r.get("modality")) for r in records]
    expected = model.answer(asked, max_new_tokens=6)
    assert len(set(expected)) > 2

    before = mlflow.get_tracking_uri()
    address = log_model(uri, run_id, step, register="brains")
    assert log_model(uri, run_id, step, register="brains") != address
    assert mlflow.get_tracking_uri() == before
    assert mlflow.active_run() is None
    step.rename(tmp_path / "gone")
    words = [sys.executable, "-c", FRESH, uri, "models:/brains/1", json.dumps(records)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [expected, expected]

    client = MlflowClient(uri)
    assert [int(v.version) for v in client.search_model_versions("name = 'brains'")] == [2, 1]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert len(run.outputs.model_outputs) == 2
    logged = client.get_logged_model(address.removeprefix("models:/"))
    assert (logged.name, logged.status, logged.params) == ("model", "READY", {"optim.lr": "0.01"})
    folder = Path(logged.artifact_location.removeprefix("file://"))
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    assert not any(file.is_symlink() for file in files.values())
    assert "artifacts/checkpoint/model.safetensors" in files
    assert not {Path(name).name for name in files} & {"state.pt", "python_model.pkl"}
    assert "umbrella-mri==" in files["requirements.txt"].read_text()
    assert json.loads(files["input_example.json"].read_text()) == EXAMPLE


@pytest.mark.parametrize("whole", [True, False])
def test_what_was_trained_on_a_base_is_logged_whole_or_as_it_is(
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
    address = log_model(uri, run_id, step, whole=whole)
    logged = MlflowClient(uri).get_logged_model(address.removeprefix("models:/"))
    answering = Path(logged.artifact_location.removeprefix("file://")) / "artifacts" / "checkpoint"
    assert (answering / "base.json").exists() != whole
    if whole:
        (tmp_path / "base").rename(tmp_path / "gone")
    loaded = AnsweringModel()
    loaded.load_context(SimpleNamespace(artifacts={"checkpoint": str(answering)}, model_config={"device": "cpu"}))
    assert loaded.model.score([], "Sex?", ["male.", "female."]) == expected


def test_what_cannot_be_logged_is_named_and_leaves_no_model(
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
