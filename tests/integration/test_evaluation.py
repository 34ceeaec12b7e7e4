"""A checkpoint that answers a split, as experiments/evaluate.py and the end of a training let it."""

from pathlib import Path
from typing import Any

import pytest

from umbrella.assessment.stream import compose, stream
from umbrella.base import UserError
from umbrella.data.loading import read_splits
from umbrella.evaluation.scoring import find_candidates
from umbrella.training.progress import best_checkpoint
from umbrella.training.run import run_training

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def quiet(things: Any, what: str) -> Any:
    return things


@pytest.fixture(scope="module")
def asked(small_settings: Any) -> Any:
    """A small training's settings, its best checkpoint, and what its cohort asks, by split."""
    settings = small_settings({"experiment": "evaluation", "name": "asked", "evaluate.batch_size": 3})
    folder = run_training(settings, quiet)
    checkpoint = best_checkpoint(folder, settings.tune.metric, settings.tune.mode)
    return settings, checkpoint, read_splits(settings, quiet, ("train", "validation", "test")).splits


def test_three_workers_answer_what_one_does(asked: Any) -> None:
    settings, checkpoint, splits = asked
    answers = {}
    for workers in (1, 3):
        told = settings.with_values({"evaluate.workers": workers, "resources.cpus_per_worker": 0.3})
        parts = stream(splits["test"], checkpoint, told, find_candidates(splits["train"]), {"age"})
        answers[workers] = [one for part in parts for one in part]
    assert answers[1] == answers[3], "to the last bit"
    assert [one.task_id for one in answers[1]] == [one.task_id for one in splits["test"]]
    assert all(one.text is not None and one.answer_nll for one in answers[1])
    assert {len(one.probabilities) for one in answers[1]} == {0, 2}, "of age and of sex"


def test_a_question_without_a_truth_is_answered_and_its_last_turn_not_looked_at(asked: Any, talk: Any) -> None:
    settings, checkpoint, splits = asked
    candidates = find_candidates(splits["train"])
    told = settings.with_values({"evaluate.generate": False})
    questions = [
        talk(("user", "Is this subject male or female?"), ("assistant", said), metadata={"target": target})
        for said, target in (("", "sex"), ("male.", "sex"), ("", "hair"))
    ]
    ((one, other, third),) = stream(questions, checkpoint, told, candidates, truth=False)
    assert set(one.probabilities) == {"female", "male"}
    assert one == other, "whatever stands there"
    assert (one.truth, one.answer_nll, one.text, third.probabilities) == ("", None, None, {})


def test_what_cannot_be_used_is_said_in_one_line(asked: Any, tmp_path: Path) -> None:
    settings, checkpoint, splits = asked
    gone = splits["test"][0].with_paths(lambda path: str(tmp_path / "gone.nii"))
    with pytest.raises(UserError, match=r"^.*gone\.nii: .*$"):
        list(stream([gone], checkpoint, settings, {}))
    with pytest.raises(UserError, match=r"need 10 CPUs, and Ray has .*evaluate\.workers"):
        list(
            stream(
                splits["test"],
                checkpoint,
                settings.with_values({"evaluate.workers": 9, "resources.cpus_per_worker": 1, "evaluate.batch_size": 1}),
                {},
            )
        )


def test_batches_hold_what_is_of_similar_length_and_everything_once(asked: Any) -> None:
    settings, _, splits = asked
    batches = compose(splits["train"], settings.modalities, 4)
    assert sorted(i for batch in batches for i in batch) == list(range(len(splits["train"])))
    assert {len(batch) for batch in batches[:-1]} == {4}
