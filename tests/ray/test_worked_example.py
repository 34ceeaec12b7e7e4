"""The example of docs/data.md: from a BIDS dataset to a ranked sweep, and to a report on all folds."""

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from tests.conftest import Done
from umbrella.evaluation.predictions import read_predictions

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

SETTINGS = {
    "name": "example",
    "modalities": {"sMRI": {"grid": [8, 8, 8], "patch": [4, 4, 4]}},
    "model": {"width": 16},
    "train": {"epochs": 4, "batch_size": 4, "accumulate": 1, "evaluate_every": 4},
    "optim": {"warmup": 2},
    "evaluate": {"at_end": False, "pictures": 0, "bootstrap": 100},
    "tracking": {"model": False},
    "tune": {"space": {"optim.lr": {"grid": [1e-2, 1e-3]}}, "scheduler": "none", "concurrent": 1},
}
SUBJECTS = [f"sub-{i:02d}" for i in range(1, 19)]


@pytest.fixture
def example(run: Callable[..., Done], mlflow_store: Callable[[Path], str], tmp_path: Path) -> Callable[..., Done]:
    """Runs the commands of the example on 18 subjects, of whom males are brighter on one side."""
    dataset, draw = tmp_path / "ds", np.random.default_rng(0)
    rows = ["participant_id\tsex\tage"]
    for i, name in enumerate(SUBJECTS):
        voxels = draw.normal(size=(8, 8, 8))
        voxels[:4] += 3 * (i % 2)
        (dataset / name / "anat").mkdir(parents=True)
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.eye(4)), dataset / f"{name}/anat/{name}_T1w.nii.gz")
        rows.append(f"{name}\t{'FM'[i % 2]}\t{20 + i}")
    (dataset / "participants.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "runs").mkdir()
    mlflow_store(tmp_path / "runs")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SETTINGS))

    def call(make: tuple[str, ...], tune: tuple[str, ...]) -> Done:
        made = run("make_conversations.py", str(dataset), "--targets", "sex", "--output", f"{tmp_path}/out", *make)
        assert made.status == 0, made.stderr
        files = (f"{tmp_path}/out/data.yaml", f"{tmp_path}/small.yaml")
        return run("tune.py", *files, f"resources.storage={tmp_path}/runs", *tune)

    return call


def ranking(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweeps/example/ranking.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.ci
def test_a_bids_dataset_becomes_a_ranked_sweep(example: Callable[..., Done], tmp_path: Path) -> None:
    done = example((), ())
    assert done.status == 0, done.stderr
    assert {row["optim.lr"] for row in ranking(tmp_path / "runs")} == {"0.01", "0.001"}
    assert "best trial:     lr=" in done.stdout


@pytest.mark.slow
def test_every_subject_of_a_bids_dataset_is_in_the_report_of_all_folds_once(
    example: Callable[..., Done], tmp_path: Path
) -> None:
    done = example(("--folds", "3", "--tasks", "T1"), ("--folds",))
    assert done.status == 0, done.stderr
    assert len(ranking(tmp_path / "runs")) == 2
    folder = tmp_path / "runs/evaluations/example-folds"
    assert (folder / "report.html").exists()
    assert Counter(p.subject_id for p in read_predictions(folder / "predictions.jsonl")) == Counter(SUBJECTS)
    assert "training 3 of 3 on folds: example-" in done.stdout

    trainings = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/trainings/*/step_*/files.json")}
    done = example(("--folds", "3", "--tasks", "T1"), ("--folds", "--resume", "last"))
    assert done.status == 0, done.stderr
    assert "on folds" not in done.stdout
    assert trainings == {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/trainings/*/step_*/files.json")}
