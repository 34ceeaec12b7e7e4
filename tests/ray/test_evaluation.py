"""A training that ends with an evaluation, and experiments/evaluate.py on the same checkpoint."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import ray
from mlflow import MlflowClient
from ray import cloudpickle
from rich.console import Console

from tests.faults.fault_injection import command_line, kill
from tests.printed import printed_to, unknown_lines
from tests.ray.conftest import no_progress
from umbrella.base import UserError
from umbrella.commands import export
from umbrella.config import Settings, load_settings
from umbrella.data.ingest import load_splits
from umbrella.data.splits import read_splits
from umbrella.data.tokenizer import tiny_tokenizer
from umbrella.evaluation.calibration import read_temperatures
from umbrella.evaluation.predictions import read_predictions
from umbrella.evaluation_run.evaluate import evaluate_at_end
from umbrella.evaluation_run.prediction_workers import PredictionWorker, map_on_actors, predict_on_workers
from umbrella.inference.export import USE
from umbrella.tracking.mlflow_logger import DESCRIPTION, MAX_METRICS
from umbrella.tracking.store import open_experiment, tracking_uri
from umbrella.training.checkpoint_files import best_checkpoint
from umbrella.training.launch import run_job
from umbrella.training.run import make_job

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # an actor would import this file: seconds each

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

LEARNS = {
    "name": "learns",
    "cohort.subjects": 60,
    "cohort.spacing": 8.0,
    "cohort.functional_subjects": 0,
    "cohort.diffusion_subjects": 0,
    "modalities.sMRI": {"grid": [16, 16, 16], "patch": [8, 8, 8]},
    "data.task_filter": r"^sub-\d+(_ses-1)?_T1w_sex$",
    "mask.supervise": "last_assistant",
    "optim.lr": 3e-3,
    "train.epochs": 30,
    "train.evaluate_every": 45,
    "tracking.model": False,
    "tracking.hash_subjects": True,
    "evaluate.batch_size": 3,
    "evaluate.pictures": 1,
}
"""The synthetic cohort with fewer subjects and coarser volumes, and one question about each subject."""
SCORE = "likelihood/subjects/balanced_accuracy"


class Evaluated(NamedTuple):
    """A training that was evaluated at its end."""

    settings: Settings
    checkpoint: Path
    folder: Path
    printed: str
    output: str
    """Output of the process."""


def train_and_evaluate(storage: Path, settings: Settings) -> Evaluated:
    folder, uri = storage / "trainings" / "learns", tracking_uri(storage)
    tracking = {"uri": uri, "experiment": open_experiment(uri, settings.experiment, storage), "name": "learns"}
    job = make_job(settings, load_splits(settings, no_progress), tracking | {"trial": "learns"}, str(folder))
    page, output = StringIO(), storage / "output.txt"
    with printed_to(output):
        # In this process, as a trial of a sweep: Ray Train's own take ten seconds to start.
        run_job(job, in_process=True)
        checkpoint = best_checkpoint(folder, settings.tune.metric, settings.tune.mode)
        assert checkpoint
        evaluate_at_end(settings, checkpoint, folder.name, no_progress, Console(file=page, width=200))
    evaluation = storage / "evaluations" / "learns"
    return Evaluated(settings, checkpoint, evaluation, page.getvalue(), output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, mlflow_store: Callable[[Path], str], ray_session: Any
) -> Evaluated:
    storage = tmp_path_factory.mktemp("runs")
    mlflow_store(storage)
    return train_and_evaluate(storage, load_settings(overrides=LEARNS | {"resources.storage": str(storage)}))


def overall(folder: Path, condition: str) -> Any:
    """Return the metrics over all answers about sex."""
    groups = json.loads((folder / "metrics.json").read_text())[condition]
    return next(group for group in groups if (group["target"], group["by"]) == ("sex", "all"))


def run_in_mlflow(settings: Settings, name: str) -> Any:
    client = MlflowClient(tracking_uri(settings.resources.storage))
    experiment = client.get_experiment_by_name(settings.experiment)
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return client, run


def test_controls_remove_what_the_images_contribute(evaluated: Evaluated) -> None:
    assert overall(evaluated.folder, "as_asked")["metrics"][SCORE]["value"] > 0.9
    for control in ("shuffled", "blank", "text_only"):
        found = overall(evaluated.folder, control)["metrics"][SCORE]
        assert found["low"] <= 0.5 <= found["high"]
        assert found["value"] < 0.8
    assert "own volumes" in evaluated.printed
    assert (evaluated.folder / "report.html").as_uri() in evaluated.printed.replace("\n", "")


def test_training_and_evaluation_print_only_known_lines(evaluated: Evaluated) -> None:
    assert "  finished\n" in evaluated.output
    assert unknown_lines(evaluated.output) == []


def test_checkpoint_stores_its_modalities_and_longest_answer(evaluated: Evaluated, run: Callable[..., Any]) -> None:
    config = json.loads((evaluated.checkpoint / "config.json").read_text())
    assert sorted(config["umbrella_modalities"]) == ["dMRI", "fMRI", "sMRI"]
    assert (config["trained_modalities"], config["longest_answer"]) == (
        ["sMRI"],
        len(tiny_tokenizer()("female.").input_ids) + 2,
    )
    scan = next((evaluated.checkpoint.parent.parent.parent).glob("phantom-*/**/*.nii.gz"))
    done = run("predict.py", str(scan), f"checkpoint={evaluated.checkpoint}", "--ask", "Sex?", "--modality", "dMRI")
    assert (done.status, done.stderr) == (2, "error: modality='dMRI': this model was trained on sMRI\n")


def test_an_exported_model_has_the_model_card_and_no_subject_ids_or_paths(evaluated: Evaluated, tmp_path: Path) -> None:
    storage, card = evaluated.folder.parent.parent, (evaluated.folder / "model_card.md").read_text()
    export.run([f"checkpoint={evaluated.checkpoint}", str(tmp_path / "exported")])
    assert (tmp_path / "exported" / "README.md").read_text() == card + USE
    subjects = {folder.name for folder in storage.glob("phantom-*/sub-*")}
    secrets = [*subjects, str(storage), str(tmp_path), str(Path.home())]
    assert len(subjects) > 10
    files = [file for file in (tmp_path / "exported").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".jinja", ".md", ".safetensors", ".yaml"}
    for file in files:
        content = file.read_bytes()
        assert [secret for secret in secrets if secret.encode() in content] == [], file


@pytest.mark.slow
def test_the_default_model_learns_its_tasks_and_scores_at_chance_with_other_subjects_volumes(tmp_path: Path) -> None:
    best_settings = {"mask.supervise": "last_assistant", "evaluate.pictures": 0}
    others = {"tracking.model": False, "resources.storage": str(tmp_path)}
    folder = train_and_evaluate(tmp_path, load_settings(overrides=best_settings | others)).folder
    assert overall(folder, "as_asked")["metrics"][SCORE]["value"] >= 0.9
    groups = json.loads((folder / "metrics.json").read_text())["as_asked"]
    for kind in ("same", "different"):
        (compared,) = (g for g in groups if (g["target"], g["by"], g["value"]) == ("sex", "comparison_type", kind))
        likely, generated = (
            compared["metrics"][f"{way}/conversations/accuracy"]["value"] for way in ("likelihood", "generated")
        )
        assert likely >= 0.85
        assert abs(likely - generated) <= 0.05
    (age,) = (g for g in groups if (g["target"], g["by"]) == ("age", "all"))
    assert age["metrics"]["likelihood/subjects/mae"]["value"] <= 0.6 * age["references"]["mean/mae"]
    shuffled = overall(folder, "shuffled")["metrics"][SCORE]
    assert shuffled["low"] <= 0.5 <= shuffled["high"]
    assert shuffled["value"] < 0.7


def test_final_evaluation_is_logged_to_the_training_run_without_subject_ids(evaluated: Evaluated) -> None:
    client, run = run_in_mlflow(evaluated.settings, "learns")
    logged, found = run.data.metrics, overall(evaluated.folder, "as_asked")["metrics"]
    assert run.info.status == "FINISHED"
    assert logged[f"test/sex/{SCORE}"] == found[SCORE]["value"]
    assert logged[f"test/sex/{SCORE}/low"] == found[SCORE]["low"]
    controls = {name for name in logged if name.startswith("test_")}
    assert controls == {f"test_{name}/sex/{SCORE}" for name in ("shuffled", "blank", "text_only")}
    assert sum(not name.startswith("system/") for name in logged) <= MAX_METRICS
    assert {given.dataset.name for given in run.inputs.dataset_inputs} == {"training", "validation", "test"}
    assert "sub-0" in (evaluated.folder / "report.html").read_text()
    assert "sub-0" not in (evaluated.folder / "model_card.md").read_text()
    assert "sex" in read_temperatures(evaluated.checkpoint)
    for name in ("report.html", "metrics.json"):
        assert "sub-0" not in Path(client.download_artifacts(run.info.run_id, f"evaluation/{name}")).read_text()


def test_two_prediction_workers_equal_one_bit_for_bit(
    evaluated: Evaluated, run: Callable[..., Any], tmp_path: Path
) -> None:
    moved = shutil.copytree(evaluated.checkpoint, tmp_path / "moved" / "step_0000001")
    words = ["evaluate.workers=2", "resources.cpus_per_worker=0.5", "evaluate.controls=[shuffled]"]
    done = run("evaluate.py", f"checkpoint={moved}", f"output={tmp_path / 'again'}", "evaluate.pictures=0", *words)
    assert done.status == 0, done.stderr
    for name in ("predictions.jsonl", "predictions_shuffled.jsonl"):
        assert read_predictions(tmp_path / "again" / name) == read_predictions(evaluated.folder / name)
    assert not (tmp_path / "again" / "predictions_text_only.jsonl").exists()
    assert overall(tmp_path / "again", "as_asked") == overall(evaluated.folder, "as_asked")
    _, own = run_in_mlflow(evaluated.settings, "evaluation of moved")
    assert own.info.status == "FINISHED"
    assert set(own.data.metrics) == {f"test/sex/{SCORE}{end}" for end in ("", "/low", "/high")} | {
        f"test_shuffled/sex/{SCORE}"
    }
    assert own.data.params["checkpoint"] == str(moved)
    assert own.data.tags[DESCRIPTION].startswith("sex: better than chance")


def test_dry_run_counts_samples_and_shared_subjects_are_an_error(evaluated: Evaluated, run: Callable[..., Any]) -> None:
    (train,) = Path(evaluated.settings.resources.storage).glob("phantom-*/conversations/train.jsonl")
    words = (f"checkpoint={evaluated.checkpoint}", "--dry-run", f"data.root={train.parent.parent}")
    done = run("evaluate.py", *words)
    assert "test: 12 conversations about 12 subjects" in done.stdout
    leak = run("evaluate.py", *words, f"data.test={train}")
    assert leak.status == 2
    assert leak.stderr.count("\n") == 1
    assert "is also in data.train" in leak.stderr
    assert "(and 34 more subjects)" in leak.stderr
    assert "evaluate.allow_shared_subjects" in leak.stderr
    allowed = run("evaluate.py", *words, f"data.test={train}", "evaluate.allow_shared_subjects=true")
    assert allowed.status == 0, allowed.stderr
    assert "note: " in allowed.stdout
    assert "is also in data.train" in allowed.stdout


def test_errors_of_a_batch_or_process_are_one_line(evaluated: Evaluated, talk: Any, tmp_path: Path) -> None:
    conversation = talk(("user", [("sMRI", tmp_path / "gone.nii"), "Sex?"]), ("assistant", "male."))
    predictions, fault = PredictionWorker(str(evaluated.checkpoint), evaluated.settings, {}, (), True).predict(
        [conversation]
    )
    assert (predictions, fault.count("\n")) == ([], 0)
    assert re.fullmatch(r".*gone\.nii: .*", fault)
    _, fault = PredictionWorker(str(tmp_path), evaluated.settings, {}, (), True).predict([conversation])
    assert fault.startswith(f"{tmp_path}: is no checkpoint")


class Squares:
    """Returns squares. The process dies at a number once per file that is named after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def predict(self, number: int) -> tuple[int, str]:
        time.sleep(0.02 * (number % 3))  # a later number may finish earlier
        for file in self.folder.glob(f"{number}-*"):
            file.unlink()
            os._exit(1)
        return number * number, "" if number < 100 else f"{number} is too large"


def squares(folder: Path, numbers: list[int], max_failures: int = 3) -> Iterator[int]:
    start = partial(ray.remote(num_cpus=0)(Squares).remote, folder)
    return map_on_actors(numbers, start, 2, max_failures)


def test_predictions_keep_their_order_when_a_worker_process_dies(ray_session: Any, tmp_path: Path) -> None:
    for name in ("0-a", "5-a", "5-b"):
        (tmp_path / name).touch()
    assert list(squares(tmp_path, list(range(12)))) == [n * n for n in range(12)]
    assert not list(tmp_path.iterdir())


def test_repeated_worker_deaths_and_exceptions_are_one_line(ray_session: Any, tmp_path: Path) -> None:
    for name in ("1-a", "1-b", "1-c"):
        (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=r"^processes .* died more than 1 times \(resources\.max_failures\), .* of: .+;.*$"
    ):
        list(squares(tmp_path, [1], max_failures=1))
    assert len(list(tmp_path.iterdir())) == 1, "two attempts"
    with pytest.raises(UserError, match=r"^100 is too large$"):
        list(squares(tmp_path, [2, 100]))


@pytest.mark.slow
def test_evaluation_completes_after_a_worker_process_is_killed(evaluated: Evaluated) -> None:
    shown = read_splits(evaluated.settings, no_progress, ("test",)).splits["test"]
    settings = evaluated.settings.with_values({"evaluate.batch_size": 1})
    killed = 0
    answers: list[Any] = []
    for part in predict_on_workers(shown * 20, evaluated.checkpoint, settings, {}):
        answers += part
        killed = killed or kill(
            p for p in psutil.Process().children(recursive=True) if "PredictionWorker" in command_line(p)
        )
    assert killed
    assert [one.task_id for one in answers] == [c.task_id for c in shown * 20]
    assert answers[: len(shown)] == answers[-len(shown) :]
