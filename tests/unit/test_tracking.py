"""MLflow stores, and what a run holds of data, code and machine. Runs are in test_mlflow_logger.py."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from umbrella.base import UserError
from umbrella.tracking import provenance
from umbrella.tracking.mlflow_logger import MlflowLogger
from umbrella.tracking.provenance import code_version, describe_dataset, environment_json
from umbrella.tracking.runs import page_urls
from umbrella.tracking.store import is_valid_target, open_experiment, tracking_uri


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One real SQLite store: to make its tables takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking_uri(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def open_one(uri: str, request: pytest.FixtureRequest) -> Callable[[], str]:
    """Opens the experiment of this test."""
    return lambda: open_experiment(uri, request.node.name, Path(uri.removeprefix("sqlite:///")).parent)


@pytest.fixture
def experiment(open_one: Callable[[], str]) -> str:
    return open_one()


def test_the_store_lies_in_the_storage_folder_unless_a_setting_or_the_environment_names_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert tracking_uri("runs") == "http://mlflow.example:5000"
    assert tracking_uri("runs", "http://other.example") == "http://other.example"


def test_data_are_inputs_with_size_balance_and_fingerprint_and_name_nobody(
    uri: str, experiment: str, client: MlflowClient, talk: Callable[..., Any], tmp_path: Path
) -> None:
    def about(subject: str, label: str | float) -> Any:
        target = "sex" if isinstance(label, str) else "age"
        told = {"subject_id": subject, "subject_label": label, "target": target}
        return talk(("user", "?"), ("assistant", "!"), metadata=told)

    people = [("sub-1", "male"), ("sub-1", "male"), ("sub-2", "female"), ("sub-3", 63.5), ("sub-4", 60.5)]
    cohort = [about(*person) for person in people]
    tracker = MlflowLogger.start(uri, experiment, "inputs", folder=tmp_path)
    for _ in range(2):  # it starts again
        tracker.inputs(
            [
                describe_dataset("training", cohort, "abc123", ["a.jsonl"]),
                describe_dataset("validation", [], "abc123", []),
            ]
        )
    training, validation = client.get_run(tracker.run_id).inputs.dataset_inputs
    assert [(tag.key, tag.value) for tag in training.tags] == [("mlflow.data.context", "training")]
    assert [(tag.key, tag.value) for tag in validation.tags] == [("mlflow.data.context", "validation")]
    assert training.dataset.digest == validation.dataset.digest == "abc123"
    assert json.loads(training.dataset.profile) == {
        "split": "training",
        "conversations": 5,
        "subjects": 4,
        "labels": {"sex": {"female": 1, "male": 2}, "age": {"count": 2, "mean": 62.0}},
    }
    assert "sub-" not in str(training.to_dictionary())


def test_the_environment_has_versions_and_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "s3cr3t-value")
    text = environment_json()
    told = json.loads(text)
    assert {"python", "host", "cpus", "gpus", "cuda", "torch", "ray", "packages"} <= told.keys()
    assert f"mlflow=={version('mlflow')}" in told["packages"]
    assert "s3cr3t-value" not in text
    assert "PATH" not in text


def test_a_target_is_a_name_exactly_where_mlflow_takes_its_metrics(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    run_id = MlflowLogger.start(uri, experiment, "names", folder=tmp_path).run_id
    for target in ("sex", "age group", "site/a", "a.b", "-", "Größe", "x" * 220):
        assert is_valid_target(target)
        client.log_metric(run_id, f"eval/{target}/balanced_accuracy", 1.0)
    for target in ("site/", "/a", "a//b", "a/../b", ".", "what?", "", "x" * 250):
        assert not is_valid_target(target)
        with pytest.raises(MlflowException):
            client.log_metric(run_id, f"eval/{target}/balanced_accuracy", 1.0)


def test_an_experiment_is_opened_again_by_name_and_a_deleted_one_is_refused(
    open_one: Callable[[], str], client: MlflowClient
) -> None:
    experiment = open_one()
    assert open_one() == experiment
    client.delete_experiment(experiment)
    with pytest.raises(UserError, match=r"was deleted; restore it, or choose another name: experiment=\.\.\."):
        open_one()


@pytest.mark.parametrize("way", ["moved", "linked"])
def test_a_storage_that_was_moved_goes_on_and_a_note_says_where_the_artifacts_are(
    mlflow_store: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture, way: str
) -> None:
    old, new = tmp_path / "old_place", tmp_path / "new%place"
    old.mkdir()
    experiment = open_experiment(mlflow_store(old), "x", old)
    run = MlflowLogger.start(tracking_uri(old), experiment, "one", folder=old / "trainings/one")
    run.text("before", "before.txt")
    run.metrics({"train/loss": 1.0}, 1)
    run.flush()
    capsys.readouterr()
    old.rename(new)
    if way == "linked":
        old.symlink_to(new)
    assert open_experiment(tracking_uri(new), "x", new) == experiment
    said = capsys.readouterr().err
    assert said.count("note: ") == (way == "moved")
    assert (f"old address, {(old / 'artifacts').as_uri()}; link that folder to {new / 'artifacts'}" in said) == (
        way == "moved"
    )
    again = MlflowLogger.start(tracking_uri(new), experiment, "one", folder=new / "trainings/one")
    again.text("after", "after.txt")
    again.metrics({"train/loss": 2.0}, 2)
    again.end()
    assert again.run_id == run.run_id
    assert [m.step for m in again.client.get_metric_history(run.run_id, "train/loss")] == [1, 2]
    found = {file.path for file in again.client.list_artifacts(run.run_id)}
    assert found == ({"before.txt", "after.txt"} if way == "linked" else {"after.txt"})
    assert {file.name for file in (new / "trainings/one/mlflow/files").iterdir()} == {"before.txt", "after.txt"}


@pytest.mark.parametrize(
    "store",
    [
        "file:{}",  # MLflow has given up its file store
        "sqlite:///{}/mlflow.db",
    ],
)
def test_a_store_that_cannot_be_used_is_named(tmp_path: Path, store: str) -> None:
    (tmp_path / "mlflow.db").write_text("not a database at all", encoding="utf-8")
    with pytest.raises(UserError, match=f"MLflow at {store.format(tmp_path)}: "):
        open_experiment(store.format(tmp_path), "umbrella", tmp_path)


def test_the_code_is_named_by_its_commit_in_a_checkout_and_not_outside(
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


def test_mlflow_sends_no_telemetry_and_gives_up_within_half_a_minute_unless_a_variable_says_otherwise() -> None:
    code = """
import os
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "7"
import umbrella.tracking.store
from mlflow import environment_variables as options
for name in ("DISABLE_TELEMETRY", "HTTP_REQUEST_TIMEOUT", "HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_BACKOFF_FACTOR"):
    print(getattr(options, f"MLFLOW_{name}").get())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == (["True", "15", "7", "1"], "")


def test_the_links_show_runs_best_first_and_the_newest_sweeps_trials(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    assert list(page_urls(uri, experiment, "http://here", "eval/loss", "min")) == ["runs, best first"]
    trials = []
    for sweep in ("old", "new"):
        parent = MlflowLogger.start(uri, experiment, sweep, folder=tmp_path / sweep).run_id
        for name in ("a", "b"):
            told = {"folder": tmp_path / sweep / "trials" / name, "parent": parent, "trial": f"{sweep}-{name}"}
            trials.append(MlflowLogger.start(uri, experiment, name, **told).run_id)
    found = page_urls(uri, experiment, "http://here", "eval/age group/mae", "min")
    assert found == {
        "runs, best first": f"http://here/#/experiments/{experiment}/runs?workflowType=machine_learning"
        "&orderByKey=metrics.%60best%2Feval%2Fage%20group%2Fmae%60&orderByAsc=true",
        "trials of the newest sweep, side by side": "http://here/#/compare-runs?"
        f"runs=%5B%22{trials[2]}%22%2C%22{trials[3]}%22%5D&experiments=%5B%22{experiment}%22%5D"
        "&workflowType=machine_learning",
    }
    assert not any(name.startswith("mlflow.sharedViewState") for name in client.get_experiment(experiment).tags)
