"""Training and evaluation of the baseline."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from mlflow import MlflowClient

from tests.ray.conftest import no_progress
from tests.unit.test_baseline import about

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def write_cohort(folder: Path, split: str, people: int) -> Path:
    """Write conversations about volumes that are brighter on one side if the subject is male. Age has no effect."""
    draw = np.random.default_rng(len(split))
    lines = []
    for i in range(people):
        sex, age = ("female", "male")[i % 2], 20 + 60 * i // people
        voxels = draw.normal(size=(8, 8, 8))
        voxels[:4] += 3 * (sex == "male")
        path = folder / f"{split}{i}.nii"
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.eye(4)), path)
        for target, label in (("sex", sex), ("age", age)):
            one = about(f"{split}{i}", [("sMRI", path), "?"], label=label, target=target)
            lines.append(one.model_copy(update={"task_id": f"{split}{i}-{target}"}).model_dump_json())
    file = folder / f"{split}.jsonl"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def baseline_settings(small_settings: Callable[..., Any], mlflow_store: Callable[[Path], str], tmp_path: Path) -> Any:
    """A baseline that learns the sex of 16 subjects in a few seconds, with storage of its own."""
    data = {f"data.{split}": str(write_cohort(tmp_path, split, 16)) for split in ("train", "validation", "test")}
    own = {"baseline.target": "sex", "baseline.channels": [8, 8, 8], "baseline.epochs": 6, "baseline.batch_size": 4}
    tracking = {"resources.storage": str(tmp_path), "tracking.uri": mlflow_store(tmp_path), "name": "mine"}
    return small_settings({**data, **own, **tracking, "evaluate.bootstrap": 100, "resources.keep_checkpoints": 9})


def train_and_evaluate(settings: Any) -> Any:
    """Train in this process and evaluate: seconds less than on Ray Train."""
    from umbrella.baseline.run import evaluate, make_jobs
    from umbrella.training.launch import run_job

    splits, (job,) = make_jobs(settings, no_progress)
    run_job(job, in_process=True)
    return evaluate(job, splits)


def check_learned(found: Any) -> None:
    (predictions,) = found.predictions.values()
    assert [p.task_id for p in predictions] == [f"test{i}-sex" for i in range(16)]
    assert all(set(p.probabilities) == {"female", "male"} and p.text is None for p in predictions)
    group = found.groups["as_asked"][0]
    assert (group.target, group.kind, group.by, group.subjects, group.invalid) == ("sex", "classes", "all", 16, None)
    assert group.metrics["likelihood/subjects/balanced_accuracy"].value > 0.9


def test_baseline_learns_a_planted_cue_and_resumes_from_an_older_checkpoint_with_equal_predictions(
    baseline_settings: Any,
) -> None:
    found, report = train_and_evaluate(baseline_settings)
    check_learned(found)
    assert report.exists()
    folder = Path(baseline_settings.resources.storage) / "trainings" / "mine-sex"
    assert Path(found.model).parent == folder
    client = MlflowClient(baseline_settings.tracking.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'umbrella'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine-sex", "FINISHED")
    assert (run.data.params["optim.lr"], run.data.params["baseline.modality"]) == ("0.03", "sMRI")
    assert run.data.metrics["test/sex/likelihood/subjects/balanced_accuracy"] > 0.9
    assert {"eval/sex/balanced_accuracy", "train/loss", "train/lr"} <= set(run.data.metrics)

    steps = sorted(folder.glob("step_*"))
    for newer in steps[3:]:
        shutil.rmtree(newer)
    assert train_and_evaluate(baseline_settings)[0].predictions == found.predictions
    assert sorted(folder.glob("step_*")) == steps


@pytest.mark.slow
def test_baseline_on_two_workers_learns_a_planted_cue_and_prints_its_table(baseline_settings: Any, capsys: Any) -> None:
    from umbrella.baseline.run import run_baseline
    from umbrella.cli import make_console
    from umbrella.evaluation.report import print_evaluation

    settings = baseline_settings.with_values({"resources.workers": 2, "resources.cpus_per_worker": 0.25})
    ((found, report),) = run_baseline(settings, no_progress)
    print_evaluation(found, report, make_console())
    assert "sex" in capsys.readouterr().out
    check_learned(found)
