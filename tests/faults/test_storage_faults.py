"""A disk that fills up or is moved during a training gives one error line, and the training can be resumed."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.faults.fault_injection import at_step, start_positions
from umbrella.tracking.store import tracking_uri
from umbrella.training.checkpoint_files import find_damage, latest_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

SHORT = {"train.epochs": 4, "train.evaluate_every": 3, "data.log_samples": True, "name": "one"}
STEPS = 19


@pytest.fixture
def train(small_settings: Callable[..., Any], run: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Run train.py with a storage folder."""

    def train(storage: Path, **others: Any) -> Any:
        settings = small_settings({**SHORT, "resources.storage": str(storage), **others})
        (tmp_path / "settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")
        return run("train.py", str(tmp_path / "settings.yaml"))

    return train


def error_of(done: Any) -> str:
    """Return the error line of a script."""
    assert done.status == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def find_only_run(storage: Path) -> tuple[MlflowClient, Any]:
    client = MlflowClient(tracking_uri(storage))
    (run,) = client.search_runs([client.get_experiment_by_name("umbrella").experiment_id])
    return client, run


def steps_of(storage: Path) -> list[int]:
    client, run = find_only_run(storage)
    assert run.info.status == "FINISHED"
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]


@pytest.mark.ci
def test_training_that_fills_its_disk_stops_in_one_line_and_resumes_with_free_space(
    train: Callable[..., Any], small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    storage, disk = tmp_path / "runs", small_disk(3 << 20)
    storage.mkdir()
    (storage / "trainings").symlink_to(disk)
    keep = {"resources.keep_checkpoints": 99}
    error = error_of(train(storage, **keep))
    folder = storage / "trainings" / "one"
    last = latest_checkpoint(folder)
    assert last is not None
    assert "could not be written: No space left on device" in error
    assert error.endswith(f"the last good checkpoint is {last}")
    assert [path for path in [*folder.glob("step_*"), *folder.glob(".step_*")] if find_damage(path)] == []
    assert start_positions(folder) == [0], "no retry"

    small_disk(64 << 20)
    assert train(storage, **keep).status == 0
    assert steps_of(storage) == list(range(1, STEPS + 1))


def test_disk_filled_by_others_ends_all_workers_in_one_line(
    train: Callable[..., Any], small_disk: Callable[[int], Path]
) -> None:
    storage = small_disk(64 << 20)

    def fill() -> None:
        with suppress(OSError), (storage / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    filled = at_step(storage / "trainings" / "one", 8, fill)
    two = {"resources.workers": 2, "resources.cpus_per_worker": 0.25, "train.batch_size": 2}
    error = error_of(train(storage, **two))
    filled.join(5)
    assert error.startswith("error: the training stopped: ")
    assert "full" in error or "No space left on device" in error
    assert f"the last good checkpoint is {latest_checkpoint(storage / 'trainings' / 'one')}" in error


def test_training_resumes_as_the_same_run_after_its_storage_moved(train: Callable[..., Any], tmp_path: Path) -> None:
    storage, moved = tmp_path / "runs", tmp_path / "elsewhere"
    mover = at_step(storage / "trainings" / "one", 8, lambda: storage.rename(moved))
    error = error_of(train(storage))
    mover.join(5)
    folder = storage / "trainings" / "one"
    assert error.startswith("error: the training stopped: ")
    assert error.endswith(f"its checkpoints are gone with {folder}")
    shutil.rmtree(storage, ignore_errors=True)
    assert latest_checkpoint(moved / "trainings" / "one") is not None

    done = train(moved)
    assert done.status == 0, done.stderr
    assert steps_of(moved) == list(range(1, STEPS + 1))
    client, run = find_only_run(moved)
    assert "the storage was moved, and MLflow keeps the artifacts of experiment 'umbrella' at " in done.stderr
    assert "supervise=assistant" in Path(client.download_artifacts(run.info.run_id, "statement.txt")).read_text()
    assert [path.name for path in storage.iterdir()] == ["artifacts"], "only MLflow writes to the old folder"
