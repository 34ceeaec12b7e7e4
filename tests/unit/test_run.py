"""What is found out before a training starts: whether it fits the cluster, and whether the data give what decides."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayError

from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.conversations.schema import Conversation
from umbrella.data.splits import Splits
from umbrella.evaluation_run.cohort_predictions import read_cohort
from umbrella.training.launch import LANGUAGE_MODEL, WorkerFailureCallback, describe_failure, describe_first_failure
from umbrella.training.run import check_data, check_unchanged
from umbrella.training.task import Job, LanguageModelJob


def test_scripts_and_what_steers_a_training_do_not_import_the_model() -> None:
    light = ["umbrella.training.run", "umbrella.tuning.sweep", "umbrella.training.task", "umbrella.tuning.trial"]
    heavy = ["umbrella.models.umbrella_llava", "transformers.generation.utils", "sklearn", "torch.distributed.fsdp"]
    looked = f"import {', '.join(light)}, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", looked], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("died_of", "line"),
    [
        ("Traceback (most recent call last):\n  File a\n    b()\nOSError: gone:\n'x'\n", "OSError: gone: 'x'"),
        (
            "The actor died.\n\tclass_name: Worker\nIts node is gone.",
            "The actor died. class_name: Worker Its node is gone.",
        ),
    ],
)
def test_what_a_worker_died_of_is_the_exception_and_not_the_way_to_it(died_of: str, line: str) -> None:
    assert describe_failure(RayError(died_of)) == line


def test_what_a_worker_raised_is_named_with_its_kind() -> None:
    assert describe_failure(OSError(40, "Too many links", "x.npy")) == "OSError: [Errno 40] Too many links: 'x.npy'"
    assert describe_failure(UserError("x.npy: is gone")) == "x.npy: is gone"


def test_of_several_workers_the_one_that_is_gone_is_told(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    gone = RuntimeError("A worker health check failed.\nWorker info: Worker(\n  rank=1\n)")
    gone.health_check_failure = RayActorError(error_msg="The actor died.")  # type: ignore[attr-defined]
    others = {0: RuntimeError("connection reset"), 1: gone, 2: RuntimeError("connection reset")}
    assert describe_first_failure(others) == "The actor died."
    assert describe_first_failure({0: OSError("no file")}) == "OSError: no file"
    settings, begun = load_settings(), time.time() - 65
    job = Job(task=LANGUAGE_MODEL, settings=settings, data={}, tracking={}, folder=str(tmp_path), start_time=begun)
    (tmp_path / "workers").touch()
    WorkerFailureCallback(job).after_exception(None, others)
    assert re.fullmatch(r"01:\d\d  a worker died: The actor died\.\n", capsys.readouterr().out)
    assert not (tmp_path / "workers").exists()


def splits(talk: Callable[..., Conversation], target: str, held_out: int = 2) -> Splits:
    """Two training conversations about the sex of two subjects, and as many of them as are held out for validation."""
    about = {"target": target, "subject_label": "male"}
    one, two = (
        talk(("user", "?"), ("assistant", answer), task_id=answer, metadata=about | {"subject_label": answer})
        for answer in ("male", "female")
    )
    return Splits({"train": [one, two], "validation": [one, two][:held_out]})


@pytest.mark.parametrize(
    ("target", "metric", "message"),
    [
        ("sex (binary)?", "eval/loss", "target 'sex \\(binary\\)\\?' becomes part of a metric's name"),
        ("sex", "eval/f1", "tune.metric=eval/f1: these data give eval/loss, eval/balanced_accuracy, eval/sex/bal"),
    ],
)
def test_a_metric_that_cannot_be_had_is_found_before_the_start(
    talk: Callable[..., Conversation], target: str, metric: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_data(load_settings(overrides={"tune.metric": metric}), splits(talk, target))


def test_one_class_in_validation_leaves_no_balanced_accuracy_to_rank_by(talk: Callable[..., Conversation]) -> None:
    alike = splits(talk, "sex", held_out=1)
    with pytest.raises(UserError, match=r"these data give eval/loss, eval/sex/accuracy .* one class only of sex$"):
        check_data(load_settings(), alike)
    check_data(load_settings(overrides={"tune.metric": "eval/loss", "tune.mode": "min"}), alike)


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        (
            {"male": "male.", "Male": "male.", "female": "female."},
            "'male', 'Male' differ by case or blanks only; write",
        ),
        ({"male": "male.", "male ": "Male."}, "'male', 'male ' differ by case or blanks only; write them alike"),
        ({"yes": "Yes.", "no": "Yes."}, "'yes', 'no' have the same answer; give each label an answer of its own"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_found_before_the_start(
    talk: Callable[..., Conversation], answers: dict[str, str], line: str
) -> None:
    samples = [
        talk(("user", "?"), ("assistant", text), metadata={"target": "sex", "subject_label": label})
        for label, text in sorted(answers.items(), reverse=True)
    ]
    with pytest.raises(UserError, match=f"^labels of 'sex': .*{line[-40:]}") as error:
        check_data(load_settings(), Splits({"train": samples, "validation": samples}))
    assert all(repr(label) in str(error.value) for label in answers if label != "female")


def test_candidates_of_the_settings_that_cannot_be_told_apart_are_found_before_the_start(
    talk: Callable[..., Conversation],
) -> None:
    alike = {"sex": {"male": "Yes.", "female": "Yes."}}
    samples = [talk(("user", "?"), ("assistant", "Hello."))]
    settings = load_settings(overrides={"evaluate.candidates": alike})
    with pytest.raises(UserError, match=r"^labels of 'sex': 'male', 'female' have the same answer"):
        check_data(settings, Splits({"train": samples, "validation": samples}))
    with pytest.raises(UserError, match=r"^labels of 'sex': 'male', 'female' have the same answer"):
        read_cohort(Path("checkpoint"), settings, load_settings())


def test_a_mask_that_supervises_nothing_is_found_before_the_start(talk: Callable[..., Conversation]) -> None:
    settings = load_settings(overrides={"mask.supervise": "last_assistant"})
    silent = talk(("user", "?"), ("assistant", ""), task_id="silent")
    nothing = settings.with_values({"mask.end_of_turn": False})
    with pytest.raises(UserError, match="supervises none of the"):
        check_data(settings, Splits({"train": [silent]}), [settings, nothing])


def test_a_weight_for_a_task_that_the_data_do_not_have_is_found_before_the_start(
    talk: Callable[..., Conversation],
) -> None:
    settings = load_settings(overrides={"mask.task_weights": {"T1": 2, "T9": 3}})
    with pytest.raises(UserError, match=r"mask\.task_weights: T9: not a task_type of data\.train, which has T1; name"):
        check_data(settings, splits(talk, "sex"))


def test_a_name_goes_on_with_what_it_was_begun_with_and_nothing_else(tmp_path: Path) -> None:
    def begin(fingerprint: str = "abc", **values: Any) -> None:
        settings = load_settings(overrides={"name": "mine", **{k.replace("__", "."): v for k, v in values.items()}})
        nothing = np.zeros(0)
        data = {"data.fingerprint": fingerprint}
        tables = {"train": None, "validation": None, "train_lengths": nothing, "validation_lengths": nothing}
        tables |= {"modalities": ["sMRI"], "longest_answer": 9}
        folder = str(tmp_path / "mine")
        check_unchanged(
            LanguageModelJob(
                task=LANGUAGE_MODEL, settings=settings, **tables, candidates={}, data=data, tracking={}, folder=folder
            )
        )

    begin()
    begin(resources__workers=2, tune__grace=5)
    begin(evaluate__bands=[30], data__test=["more.jsonl"], data__input=["x.jsonl"], checkpoint="a", output="b")
    with pytest.raises(UserError, match=r"^name=mine: was started with other settings: optim\.lr was 0\.001 and is 0"):
        begin(optim__lr=0.5)
    with pytest.raises(UserError, match=r"data\.fingerprint was abc and is xyz"):
        begin("xyz")
    with pytest.raises(UserError, match=r"modalities\.PET\.patch was None and is \[2, 2, 2\]"):
        begin(modalities__PET={"grid": [4, 4, 4], "patch": [2, 2, 2]})
