"""The MLflow store: its address, experiments and links; and the data, code and environment that a run records."""

import json
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from mlflow import MlflowClient, environment_variables
from mlflow.exceptions import MlflowException

from tests.conftest import log_sweep
from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.tracking import provenance
from umbrella.tracking.mlflow_logger import MlflowLogger
from umbrella.tracking.provenance import (
    HEADLINES,
    code_version,
    describe_dataset,
    environment_json,
    headline_settings,
)
from umbrella.tracking.store import is_valid_metric, open_experiment, runs_page, tracking_uri, ui_command


def test_the_store_is_in_the_storage_folder_unless_a_setting_or_variable_names_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert tracking_uri("runs") == "http://mlflow.example:5000"
    assert tracking_uri("runs", "http://other.example") == "http://other.example"


def test_datasets_are_inputs_with_size_labels_and_fingerprint_but_without_subjects(
    uri: str, experiment: str, client: MlflowClient, talk: Callable[..., Any], tmp_path: Path
) -> None:
    people = [("sub-1", "male"), ("sub-1", "male"), ("sub-2", "female"), ("sub-3", 63.5), ("sub-4", 60.5)]
    cohort = []
    for name, (subject, label) in enumerate(people):
        target = "sex" if isinstance(label, str) else "age"
        metadata = {"subject_id": subject, "subject_label": label, "target": target}
        cohort.append(talk(("user", "?"), ("assistant", "!"), task_id=str(name), metadata=metadata))
    tracker = MlflowLogger.start(uri, experiment, "inputs", folder=tmp_path)
    splits = [("training", cohort, "abc123", ["a.jsonl"]), ("validation", [], "abc123", [])]
    for _ in range(2):  # a resumed run logs them again
        tracker.inputs([describe_dataset(*split) for split in splits])
    inputs = client.get_run(tracker.run_id).inputs.dataset_inputs
    assert [[(tag.key, tag.value) for tag in given.tags] for given in inputs] == [
        [("mlflow.data.context", "training")],
        [("mlflow.data.context", "validation")],
    ]
    assert {given.dataset.digest for given in inputs} == {"abc123"}
    assert json.loads(inputs[0].dataset.profile) == {
        "split": "training",
        "conversations": 5,
        "subjects": 4,
        "labels": {"sex": {"female": 1, "male": 2}, "age": {"count": 2, "mean": 62.0}},
    }
    assert "sub-" not in str(inputs[0].to_dictionary())


def test_the_environment_has_versions_and_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "s3cr3t-value")
    text = environment_json()
    found = json.loads(text)
    assert {"python", "host", "cpus", "gpus", "cuda", "torch", "ray", "packages"} <= found.keys()
    assert f"mlflow=={version('mlflow')}" in found["packages"]
    assert "s3cr3t-value" not in text
    assert "PATH" not in text


def test_a_metric_name_is_valid_if_and_only_if_mlflow_accepts_it(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    run_id = MlflowLogger.start(uri, experiment, "names", folder=tmp_path).run_id
    for target in ("sex", "age group", "site/a", "a.b", "-", "Größe", "x" * 220):
        assert is_valid_metric(f"eval/{target}/accuracy")
        client.log_metric(run_id, f"eval/{target}/accuracy", 1.0)
    for target in ("site/", "/a", "a//b", "a/../b", ".", "what?", "", "x" * 250):
        assert not is_valid_metric(f"eval/{target}/accuracy")
        with pytest.raises(MlflowException):
            client.log_metric(run_id, f"eval/{target}/accuracy", 1.0)


def test_an_experiment_is_opened_by_name_unless_it_was_deleted(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    assert open_experiment(uri, "x", tmp_path) == experiment
    client.delete_experiment(experiment)
    with pytest.raises(UserError, match=r"was deleted; restore it, or choose another name: experiment=\.\.\."):
        open_experiment(uri, "x", tmp_path)


@pytest.mark.parametrize("linked", [False, True])
def test_a_moved_storage_works_with_a_note_unless_its_old_place_is_a_link(
    mlflow_store: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture, linked: bool
) -> None:
    old, new = tmp_path / "old_place", tmp_path / "new%place"
    old.mkdir()
    experiment = open_experiment(mlflow_store(old), "x", old)
    run = MlflowLogger.start(tracking_uri(old), experiment, "one", folder=old / "trainings/one")
    old.rename(new)
    if linked:
        old.symlink_to(new)
    assert open_experiment(tracking_uri(new), "x", new) == experiment
    place = f"old address, {(old / 'artifacts').as_uri()}; link that folder to {new / 'artifacts'}"
    assert (place in capsys.readouterr().err) == (not linked)
    again = MlflowLogger.start(tracking_uri(new), experiment, "one", folder=new / "trainings/one")
    again.artifact("", "after.txt")
    assert again.run_id == run.run_id
    assert [file.path for file in again.client.list_artifacts(run.run_id)] == ["after.txt"]


@pytest.mark.parametrize(
    ("store", "remedy"),
    [
        ("file:{}", ""),  # MLflow has given up its file store
        ("sqlite:///{}/mlflow.db", ""),
        ("http://127.0.0.1:9", "; start it, or name another one: tracking.uri=..."),
        ("postgresql://anna:***@127.0.0.1:9/mlflow", "; start it, or name another one: tracking.uri=..."),
    ],
)
def test_a_store_that_cannot_be_used_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, remedy: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "mlflow.db").write_text("not a database at all", encoding="utf-8")
    with pytest.raises(UserError) as error:
        open_experiment(store.format(tmp_path).replace("***", "s3cr3t"), "umbrella", tmp_path)
    assert str(error.value).startswith(f"MLflow at {store.format(tmp_path).replace('anna:', '')}: ")
    assert str(error.value).endswith(remedy)
    assert "s3cr3t" not in str(error.value)


def test_the_code_version_is_the_commit_of_its_own_checkout_else_umbrella_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "umbrella"
    package.mkdir()
    (package / "provenance.py").touch()
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    for name, value in {"GIT_CEILING_DIRECTORIES": tmp_path.parent, "GIT_CONFIG_GLOBAL": "/dev/null"}.items():
        monkeypatch.setenv(name, str(value))
    assert code_version() == {}
    monkeypatch.setenv("UMBRELLA_COMMIT", "of an image")
    assert code_version() == {"mlflow.source.git.commit": "of an image"}

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert len(commit) == 40
    assert code_version() == {"mlflow.source.git.commit": commit, "git.dirty": "False"}
    (package / "provenance.py").write_text("changed", encoding="utf-8")
    assert code_version() == {"mlflow.source.git.commit": commit, "git.dirty": "True"}


def test_the_command_that_opens_mlflow_names_a_storage_other_than_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, command in (
        ("runs", "umbrella ui"),
        ("my runs", f"umbrella ui 'resources.storage={tmp_path}/my runs'"),
    ):
        assert ui_command(tracking_uri(tmp_path / folder), tmp_path / folder) == command
    assert ui_command("sqlite:///other.db", tmp_path / "runs") == "umbrella ui tracking.uri=sqlite:///other.db"
    assert ui_command("http://name:word@host", tmp_path) == "http://***@host"


def test_mlflow_sends_no_telemetry_and_gives_up_early() -> None:
    assert environment_variables.MLFLOW_DISABLE_TELEMETRY.get()
    assert environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 15
    assert environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 1


def test_the_page_shows_the_newest_sweep_best_first_by_its_own_metric(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    page = f"http://here/#/experiments/{experiment}/runs?workflowType=machine_learning"
    assert runs_page(uri, experiment, "http://here") == page, "no sweep yet"
    log_sweep(uri, experiment, tmp_path / "old", "eval/age group/mae", "min", [0.1])
    log_sweep(uri, experiment, tmp_path / "new", "eval/age group/mae", "min", [3.0, 1.0, 2.0])
    MlflowLogger.start(uri, experiment, "a training", folder=tmp_path / "training")
    found = runs_page(uri, experiment, "http://here")
    assert found == (
        f"{page}&searchFilter=tags.%60umbrella.sweep%60%20%3D%20%27new%27"
        "&orderByKey=metrics.%60best%2Feval%2Fage%20group%2Fmae%60&orderByAsc=true"
    )
    query = {name: value for name, (value,) in parse_qs(urlsplit(found.replace("#/", "")).query).items()}
    runs = client.search_runs([experiment], query["searchFilter"], order_by=[f"{query['orderByKey']} ASC"])
    assert [run.info.run_name for run in runs] == ["lr=1.0", "lr=2.0", "lr=3.0", "new"]
    assert {run.data.tags["mlflow.source.name"] for run in runs} == {"new"}, "MLflow's column Source"


def test_parameters_are_the_swept_and_some_twenty_headline_settings() -> None:
    space = {"optim.clip": {"grid": [0.5, 1.0]}, "modalities.sMRI": {"grid": [{}]}}
    settings = load_settings(overrides={"tune.space": space})
    found = headline_settings(settings, unused=("baseline",))
    assert {"optim.lr": 7e-4, "optim.clip": 1.0}.items() <= found.items()
    assert {name for name in found if name.startswith("modalities.")} == {
        name for name in settings.flat() if name.startswith("modalities.sMRI.")
    }
    names = {f"{section}.{name}".strip(".") for section, of_section in HEADLINES.items() for name in of_section}
    assert names - set(found) == {"baseline.modality"}, "a name of no setting, or of a section that is unused"
    assert 15 <= len(names) <= 25
    assert "train.tokens_per_batch" not in found
    changed = headline_settings(settings.with_values({"train.tokens_per_batch": 99}))
    assert changed["train.tokens_per_batch"] == 99
