"""MLflow: what is tracked can be read back, wherever the storage lies, and what is refused is named and kept."""

import json
import shutil
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service import utils as mlflow_utils

from umbrella.base import UserError
from umbrella.tracking import environment
from umbrella.tracking.datasets import describe
from umbrella.tracking.delivery import OUTCOME
from umbrella.tracking.environment import code_version, environment_json
from umbrella.tracking.runs import Tracker, is_name
from umbrella.tracking.store import open_experiment, tracking_uri


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


def test_what_is_tracked_is_read_back(uri: str, experiment: str, client: MlflowClient, tmp_path: Path) -> None:
    tracker = Tracker.start(uri, experiment, "a trial", parent="f" * 32, trial="a8_00001")
    requests = []
    write = tracker.client.log_batch

    def watch(run_id: str, **entities: list) -> None:
        requests.append({kind: len(some) for kind, some in entities.items()})
        write(run_id, **entities)

    tracker.client.log_batch = watch
    tracker.params({f"group.setting_{i}": i for i in range(230)})
    tracker.params({"group.setting_0": "changed", "optim.lr": 1e-05})
    for step in range(1300):
        tracker.metrics({"train/loss": 1 / (step + 1)}, step)
    tracker.metrics({"train/grad_norm": float("nan")}, 3)
    assert client.get_run(tracker.run_id).data.metrics == {}  # gathered, not yet written
    tracker.text("loss: Σ", "statement.txt")
    (tmp_path / "ranking.csv").write_text("trial\n", encoding="utf-8")
    tracker.artifact(tmp_path / "ranking.csv", "tables")
    tracker.end()

    # A server refuses more than 100 parameters or 1000 metrics in a request, which SQLite does not.
    assert requests == [
        {"params": 100},
        {"params": 100},
        {"params": 30},
        {"params": 1},
        {"metrics": 1000},
        {"metrics": 301},
        {"tags": 1},
    ]
    run = client.get_run(tracker.run_id)
    assert (run.info.run_name, run.info.status) == ("a trial", "FINISHED")
    assert run.data.params == {f"group.setting_{i}": str(i) for i in range(230)} | {"optim.lr": "1e-05"}
    history = client.get_metric_history(tracker.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(step, 1 / (step + 1)) for step in range(1300)]
    expected = {"mlflow.parentRunId": "f" * 32, "ray.trial_id": "a8_00001", OUTCOME: "finished"}
    assert run.data.tags.items() >= expected.items()
    folder = Path(uri.removeprefix("sqlite:///")).parent / "artifacts" / tracker.run_id / "artifacts"
    assert (folder / "statement.txt").read_text(encoding="utf-8") == "loss: Σ"
    assert [file.path for file in client.list_artifacts(tracker.run_id, "tables")] == ["tables/ranking.csv"]


def test_what_waits_and_lost_its_file_while_it_was_copied_has_been_sent(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    tracker = Tracker.start(uri, experiment, "x", folder=tmp_path)
    tracker.outbox.put({"do": "file", "path": "files/gone/predictions.json", "to": ""})
    tracker.tags({"after": "it"})
    assert client.get_run(tracker.run_id).data.tags["after"] == "it"


def test_a_result_that_changed_is_the_runs_and_one_that_did_not_is_there_once(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path
) -> None:
    name = "best/eval/balanced_accuracy"
    for best in (0.75, 0.75, 0.5):
        tracker = Tracker.start(uri, experiment, "sweep", trial="sweep", folder=tmp_path)
        tracker.results({name: best}, 0)
        tracker.end()
        assert client.get_run(tracker.run_id).data.metrics == {name: best}
    history = client.get_metric_history(tracker.run_id, name)
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.75), (0, 0.5)]


def test_what_mlflow_refuses_is_named_once_and_kept_and_the_training_goes_on(
    uri: str, experiment: str, client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tracker = Tracker.start(uri, experiment, "x", trial="deleted", folder=tmp_path)
    client.delete_run(tracker.run_id)
    for step in range(3):
        tracker.metrics({"train/loss": 1.5}, step)
        tracker.flush()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: MLflow at {uri} refuses what it is told: ")
    kept = next(tmp_path.rglob("refused.jsonl"))
    assert line.endswith(f"; kept in {kept}")
    assert [json.loads(word)["until"] for word in kept.read_text(encoding="utf-8").splitlines()] == [0, 1, 2]


def test_data_are_inputs_with_size_balance_and_fingerprint_and_name_nobody(
    uri: str, experiment: str, client: MlflowClient, talk: Callable[..., Any]
) -> None:
    def about(subject: str, label: str | float) -> Any:
        target = "sex" if isinstance(label, str) else "age"
        told = {"subject_id": subject, "subject_label": label, "target": target}
        return talk(("user", "?"), ("assistant", "!"), metadata=told)

    people = [("sub-1", "male"), ("sub-1", "male"), ("sub-2", "female"), ("sub-3", 63.5), ("sub-4", 60.5)]
    cohort = [about(*person) for person in people]
    tracker = Tracker.start(uri, experiment, "inputs")
    for _ in range(2):  # it starts again
        tracker.inputs([describe("training", cohort, "abc123", ["a.jsonl"]), describe("validation", [], "abc123", [])])
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


def test_the_machine_is_watched_to_the_end_of_a_run_in_seconds_since_its_start(
    uri: str, experiment: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def seen(run_id: str) -> list[tuple[int, int]]:
        history = client.get_metric_history(run_id, "system/cpu_utilization_percentage")
        return [(metric.timestamp, metric.step) for metric in history]

    def train() -> str:
        tracker = Tracker.start(uri, experiment, "x", trial="watched", folder=tmp_path)
        tracker.watch_system()
        time.sleep(1.1)
        tracker.end()
        return tracker.run_id

    run_id = train()
    before = len(seen(run_id))
    assert before >= 3
    assert train() == run_id
    start = client.get_run(run_id).info.start_time
    assert len(seen(run_id)) > before
    assert [step for _, step in seen(run_id)] == [(when - start) // 1000 for when, _ in seen(run_id)]
    written = client.get_run(run_id).data.metrics
    assert {"system/system_memory_usage_megabytes", "system/disk_usage_percentage"} <= written.keys()
    assert "umbrella-machine" not in {thread.name for thread in threading.enumerate()}
    assert list(elsewhere.iterdir()) == [], "MLflow made a database where the process stands"


def test_a_target_is_a_name_exactly_where_mlflow_takes_its_metrics(
    uri: str, experiment: str, client: MlflowClient
) -> None:
    run_id = Tracker.start(uri, experiment, "names").run_id
    for target in ("sex", "age group", "site/a", "a.b", "-", "Größe", "x" * 220):
        assert is_name(target)
        client.log_metric(run_id, f"eval/{target}/balanced_accuracy", 1.0)
    for target in ("site/", "/a", "a//b", "a/../b", ".", "what?", "", "x" * 250):
        assert not is_name(target)
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


@pytest.mark.parametrize("way", ["moved", "copied", "linked"])
def test_artifacts_are_found_and_written_where_the_storage_lies_now(
    uri: str,
    experiment: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    way: str,
) -> None:
    old, new = tmp_path / "old_place", tmp_path / "new%place"
    shutil.copytree(Path(uri.removeprefix("sqlite:///")).parent, old)
    name = request.node.name
    assert open_experiment(tracking_uri(old), name, old) == experiment
    run = Tracker.start(tracking_uri(old), experiment, "one", trial="one", folder=old / "trainings/one")
    run.text("before", "before.txt")
    if way == "moved":
        old.rename(new)
    elif way == "copied":
        shutil.copytree(old, new)
    else:
        new.symlink_to(old)
    monkeypatch.setattr(mlflow_utils, "_artifact_repos_cache", OrderedDict())  # which another process has not
    assert open_experiment(tracking_uri(new), name, new) == experiment
    again = Tracker.start(tracking_uri(new), experiment, "one", trial="one", folder=new / "trainings/one")
    assert again.run_id == run.run_id
    again.text("after", "after.txt")
    files = {file.path for file in again.client.list_artifacts(run.run_id)}
    assert files == {"before.txt", "after.txt"}
    where = again.client.get_run(run.run_id).info.artifact_uri
    assert where == f"{(old if way == 'linked' else new).as_uri()}/artifacts/{run.run_id}/artifacts"
    assert (new / "artifacts" / run.run_id / "artifacts" / "after.txt").exists()
    assert old.exists() == (way != "moved")
    if way == "copied":
        assert not (old / "artifacts" / run.run_id / "artifacts" / "after.txt").exists()


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
    (package / "environment.py").touch()
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
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
    (package / "environment.py").write_text("changed", encoding="utf-8")
    assert code_version() == {"mlflow.source.git.commit": commit, "git.dirty": "True"}
