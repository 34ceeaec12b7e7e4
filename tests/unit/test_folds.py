"""Cross-validation of a sweep's best settings, up to the trainings: its folds, checks and common report."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Done
from tests.unit.test_make_conversations import people, subjects, touch
from umbrella.base import UserError
from umbrella.config import Settings, load_settings
from umbrella.data.splits import read_splits
from umbrella.evaluation.predictions import Prediction, read_predictions, write_predictions
from umbrella.evaluation.report import AS_ASKED, predictions_file
from umbrella.evaluation_run.folds import evaluate_folds, fold_settings, read_held_out
from umbrella.paths import BEST, REPORT
from umbrella.tracking.mlflow_logger import MlflowLogger

TRIAL = "night-0123456789"


def no_progress(items: Any, description: str) -> Any:
    return items


@pytest.fixture
def chosen(run: Callable[..., Done], tmp_path: Path) -> Settings:
    """The settings of a training on the first of three folds of 24 subjects."""
    for name in subjects():
        touch(tmp_path / "ds", f"{name}/anat/{name}_T1w.nii.gz")
    people(tmp_path / "ds")
    for i, file in enumerate(sorted((tmp_path / "ds").glob("*/*/*.gz"))):
        file.write_bytes(bytes(i + 1))
    words = ("--targets", "sex", "--tasks", "T1", "--output", f"{tmp_path}/out", "--folds", "3")
    done = run("make_conversations.py", f"{tmp_path}/ds", *words)
    assert done.stdout.rstrip().endswith("grid_96.yaml --folds"), done.stderr
    own = {"resources.storage": f"{tmp_path}/runs", "evaluate.controls": ["shuffled"], "evaluate.bootstrap": 100}
    return load_settings([tmp_path / "out/data.yaml"], own)


def test_each_subject_is_held_out_by_one_fold(chosen: Settings) -> None:
    folds = fold_settings(chosen, TRIAL)
    assert [fold.name for fold in folds] == [f"{TRIAL}-fold-{i}" for i in (1, 2, 3)]
    assert folds[0].data == chosen.data
    assert folds[0].data.validation != folds[1].data.validation
    assert Counter(c.subject_id for c in read_held_out(folds, no_progress)) == Counter(subjects())


def test_data_without_folds_are_refused_with_the_command_that_makes_them(
    run: Callable[..., Done], chosen: Settings, tmp_path: Path
) -> None:
    for words in ([], [f"{tmp_path}/out/data.yaml", f"data.test={tmp_path}/out/fold-2/test.jsonl"]):
        done = run("tune.py", *words, "--folds", "--dry-run", f"resources.storage={tmp_path}/runs")
        assert (done.status, done.stderr.count("\n")) == (2, 1)
        assert "umbrella make-conversations --folds 5" in done.stderr
    done = run("tune.py", f"{tmp_path}/out/data.yaml", "--folds", "--dry-run", f"resources.storage={tmp_path}/runs")
    assert done.stdout.endswith("folds: 3, on each of which the best settings are trained once\n"), done.stderr


def test_a_subject_that_is_held_out_twice_or_never_is_one_error(chosen: Settings, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "out/fold-1/test.jsonl", tmp_path / "out/fold-2/test.jsonl")
    with pytest.raises(UserError, match=r"^--folds: 16 of 24 subjects are not .*, first sub-\d+ \(in [02]\);[^\n]*$"):
        read_held_out(fold_settings(chosen), no_progress)
    shutil.rmtree(tmp_path / "out/fold-3")
    shutil.rmtree(tmp_path / "out/fold-2")
    with pytest.raises(UserError, match=r"^--folds: 16 of 24 subjects are not .* \(in 0\);"):
        read_held_out(fold_settings(chosen), no_progress)


def test_the_report_has_the_answers_of_all_folds_and_its_metrics_are_those_of_the_sweep(
    chosen: Settings, experiment: str, uri: str, client: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from umbrella.cli import make_console

    settings = chosen.with_values({"tracking.uri": uri})
    sweep, evaluations = tmp_path / "runs/sweeps/night", tmp_path / "runs/evaluations"
    logger = MlflowLogger.start(uri, experiment, "night", folder=sweep)
    logger.end()
    (sweep / BEST).write_text(settings.to_yaml())
    for fold in fold_settings(settings, TRIAL):  # whose trainings are complete; that of fold-2 learnt the opposite
        folder = evaluations / fold.name
        folder.mkdir(parents=True)
        male = 0.2 if fold.name.endswith("2") else 0.8
        answers = []
        for c in read_splits(fold, no_progress, ("test",)).splits["test"]:
            p = Prediction.from_conversation(c)
            right = male if p.label == "male" else 1 - male
            answers.append(replace(p, probabilities={"male": right, "female": 1 - right}))
        for condition in (AS_ASKED, "shuffled"):
            write_predictions(predictions_file(folder, condition), answers)
        (folder / REPORT).touch()
    evaluate_folds(sweep, TRIAL, no_progress, make_console())

    folder = evaluations / "night-folds"
    for condition in (AS_ASKED, "shuffled"):
        answers = read_predictions(predictions_file(folder, condition))
        assert Counter(p.subject_id for p in answers) == Counter(subjects())
    name = "likelihood/subjects/balanced_accuracy"
    groups = json.loads((folder / "metrics.json").read_text())[AS_ASKED]
    found = {group["value"]: group["metrics"][name]["value"] for group in groups if group["by"] in ("all", "fold")}
    assert found == {"": pytest.approx(2 / 3), "fold-1": 1, "fold-2": 0, "fold-3": 1}
    logged = client.get_run(logger.run_id)
    assert logged.data.metrics[f"test/sex/{name}"] == found[""]
    assert logged.data.metrics[f"test/sex/{name}/low"] < found[""] < logged.data.metrics[f"test/sex/{name}/high"]
    (given,) = logged.inputs.dataset_inputs
    assert given.dataset.name == "test"
    assert all(f"fold-{i}/test.jsonl" in given.dataset.source for i in (1, 2, 3))
    assert "there is no nested selection" in (folder / REPORT).read_text()
    assert "24 conversations" in capsys.readouterr().out
