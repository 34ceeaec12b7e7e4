"""Checks of data and settings before a training starts, and descriptions of its failures."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayError

from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.conversations.schema import Conversation
from umbrella.data.splits import Splits
from umbrella.evaluation_run.cohort_predictions import read_cohort
from umbrella.paths import BEGUN
from umbrella.training.launch import LANGUAGE_MODEL, WorkerFailureCallback, describe_failure
from umbrella.training.run import check_data, check_unchanged
from umbrella.training.task import Job


class JobWithoutData(Job):
    """A job that is not run."""

    plan = maker = None  # type: ignore[assignment]


def test_scripts_and_trial_processes_do_not_import_the_model() -> None:
    light = ["umbrella.training.run", "umbrella.tuning.sweep", "umbrella.training.task", "umbrella.tuning.trial"]
    heavy = ["umbrella.models.umbrella_llava", "transformers.generation.utils", "sklearn", "torch.distributed.fsdp"]
    looked = f"import {', '.join(light)}, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", looked], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_inference_does_not_import_ray() -> None:
    looked = "import umbrella.inference.model, sys; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", looked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RayError("Traceback (most recent call last):\n  File a\n    b()\nOSError: x:\n'y'\n"), "OSError: x: 'y'"),
        (
            RayError("The actor died.\n\tclass_name: W\nIts node is gone."),
            "The actor died. class_name: W Its node is gone.",
        ),
        (OSError(40, "Too many links", "x.npy"), "OSError: [Errno 40] Too many links: 'x.npy'"),
        (UserError("x.npy: is gone"), "x.npy: is gone"),
    ],
)
def test_a_failure_is_described_in_one_line_without_its_traceback(error: Exception, line: str) -> None:
    assert describe_failure(error) == line


def test_of_several_failed_workers_the_one_that_died_is_reported(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    died = RuntimeError("A worker health check failed.\nWorker info: Worker(\n  rank=1\n)")
    died.health_check_failure = RayActorError(error_msg="The actor died.")  # type: ignore[attr-defined]
    failures = {0: RuntimeError("connection reset"), 1: died, 2: RuntimeError("connection reset")}
    settings, start = load_settings(), time.time() - 65
    job = JobWithoutData(
        task=LANGUAGE_MODEL, settings=settings, data={}, tracking={}, folder=str(tmp_path), start_time=start
    )
    (tmp_path / "workers").touch()
    WorkerFailureCallback(job).after_exception(None, failures)
    assert re.fullmatch(r"01:\d\d  a worker died: The actor died\.\n", capsys.readouterr().out)
    assert not (tmp_path / "workers").exists()


Talk = Callable[..., Conversation]


def labelled(talk: Talk, answers: Mapping[str, str], target: str = "sex") -> list[Conversation]:
    """A conversation for each label, with its answer."""
    return [
        talk(("user", "?"), ("assistant", text), metadata={"target": target, "subject_label": label})
        for label, text in answers.items()
    ]


BOTH = {"male": "male", "female": "female"}


@pytest.mark.parametrize(
    ("target", "held_out", "metric", "message"),
    [
        ("sex (binary)?", 2, "eval/loss", "target 'sex \\(binary\\)\\?' becomes part of a metric's name"),
        ("sex", 2, "eval/f1", "tune.metric=eval/f1: these data give eval/loss, eval/balanced_accuracy, eval/sex/bal"),
        ("sex", 1, "eval/balanced_accuracy", "these data give eval/loss, eval/sex/acc.* one class only of sex$"),
    ],
)
def test_a_metric_that_the_data_do_not_give_is_an_error(
    talk: Talk, target: str, held_out: int, metric: str, message: str
) -> None:
    samples = labelled(talk, BOTH, target)
    splits = Splits({"train": samples, "validation": samples[:held_out]})
    with pytest.raises(UserError, match=message):
        check_data(load_settings(overrides={"tune.metric": metric}), splits)
    if target == "sex":
        check_data(load_settings(overrides={"tune.metric": "eval/loss", "tune.mode": "min"}), splits)


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        (
            {"Male": "male.", "male": "male.", "female": "f."},
            "'Male', 'male' differ by case or blanks only; write them",
        ),
        ({"male ": "Male.", "male": "male."}, "'male', 'male ' differ by case or blanks only; write them alike"),
        ({"yes": "Yes.", "no": "Yes."}, "'yes', 'no' have the same answer; give each label an answer of its own"),
    ],
)
def test_labels_that_are_too_similar_are_an_error(talk: Talk, answers: dict[str, str], line: str) -> None:
    settings, samples = load_settings(), labelled(talk, answers)
    with pytest.raises(UserError, match=f"^labels of 'sex': .*{line[-40:]}") as error:
        check_data(settings, Splits({"train": samples, "validation": samples}))
    assert all(repr(label) in str(error.value) for label in answers if label != "female")


def test_candidates_of_the_settings_with_the_same_answer_are_an_error(talk: Talk) -> None:
    settings = load_settings(overrides={"evaluate.candidates": {"sex": {"male": "Yes.", "female": "Yes."}}})
    samples = [talk(("user", "?"), ("assistant", "Hello."))]
    with pytest.raises(UserError, match=r"^labels of 'sex': 'male', 'female' have the same answer"):
        check_data(settings, Splits({"train": samples, "validation": samples}))
    with pytest.raises(UserError, match=r"^labels of 'sex': 'male', 'female' have the same answer"):
        read_cohort(Path("checkpoint"), settings, load_settings())


@pytest.mark.parametrize(
    ("mask", "answer", "message"),
    [
        ({"end_of_turn": False}, "", "supervises none of the"),
        (
            {"task_weights": {"T1": 2, "T9": 3}},
            "a",
            r"mask\.task_weights: T9: not a task_type of data\.train, which has T1;",
        ),
    ],
)
def test_a_mask_that_does_not_suit_the_data_is_an_error(talk: Talk, mask: dict, answer: str, message: str) -> None:
    settings = load_settings(overrides={f"mask.{name}": value for name, value in mask.items()})
    samples = labelled(talk, {"male": answer})
    with pytest.raises(UserError, match=message):
        check_data(settings, Splits({"train": samples, "validation": samples}))


def test_a_training_continues_only_with_the_settings_and_data_that_it_began_with(tmp_path: Path) -> None:
    def begin(overrides: dict[str, Any], fingerprint: str = "abc") -> None:
        job = JobWithoutData(
            task=LANGUAGE_MODEL,
            settings=load_settings(overrides={"name": "mine", **overrides}),
            data={"data.fingerprint": fingerprint},
            tracking={},
            folder=str(tmp_path / "mine"),
        )
        check_unchanged(job)

    begin({})
    others = {"checkpoint": "a", "output": "b", "compare": "c"}
    begin({"resources.workers": 2, "tune.grace": 5, "evaluate.bands": [30], **others})
    begin({"data.test": ["more.jsonl"], "data.input": ["x.jsonl"]})
    file = tmp_path / "mine" / BEGUN
    older = {k: v for k, v in json.loads(file.read_text()).items() if k != "data.group_batches_by"}
    file.write_text(json.dumps(older))
    begin({})  # an older version did not have the setting
    with pytest.raises(UserError, match=r"^name=mine: was started with other settings: optim\.lr was 0\.0007 and is 0"):
        begin({"optim.lr": 0.5})
    with pytest.raises(UserError, match=r"evaluate\.number_grids\.age was None and is \[20.0, 80.0, 1.0\]"):
        begin({"evaluate.number_grids": {"age": [20, 80, 1]}})
    with pytest.raises(UserError, match=r"data\.fingerprint was abc and is xyz"):
        begin({}, "xyz")
    with pytest.raises(UserError, match=r"modalities\.PET\.patch was None and is \[2, 2, 2\]"):
        begin({"modalities.PET": {"grid": [4, 4, 4], "patch": [2, 2, 2]}})
