"""predict.py over a cohort: it answers on Ray, and goes on where a killed one stopped."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Done, write_questions
from umbrella.config import load_settings
from umbrella.conversations.schema import Conversation
from umbrella.evaluation.predictions import read_predictions
from umbrella.evaluation_run.cohort_predictions import predict_cohort, read_cohort
from umbrella.inference.model import Umbrella, load_checkpoint_settings

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


class Killed(Exception):
    """Simulates the death of the process."""


def test_killed_cohort_prediction_resumes_to_the_same_file_without_repeats(
    ask: Callable[..., Done], learnt: Path, said: list[Conversation], tmp_path: Path
) -> None:
    cohort = [c.model_copy(update={"task_id": f"{c.task_id}{i}"}) for i in range(4) for c in said]
    file, out = write_questions(tmp_path / "in.jsonl", cohort), tmp_path / "out.jsonl"
    candidates = {"T2": {"female": "female.", "male": "male."}}
    options = {
        "data.input": str(file),
        "output": str(out),
        "resources.storage": f"{tmp_path}/runs",
        "evaluate.batch_size": 1,
        "evaluate.candidates": candidates,
    }
    words, settings = [f"{name}={json.dumps(value)}" for name, value in options.items()], load_settings((), options)
    counts = []

    def progress(things: Sequence, what: str, last: int = 10) -> Iterator:
        for number, thing in enumerate(things):
            if what.startswith("answering"):
                counts.append(number)
                if number == last:
                    raise Killed
            yield thing

    assert ask(*words, "--dry-run") == (0, f"would predict 12 of 12 conversations; 0 have a prediction in {out}\n", "")
    assert not out.exists()
    with pytest.raises(Killed):
        predict_cohort(read_cohort(learnt, settings, load_checkpoint_settings(learnt, None)), progress)
    before = out.read_bytes()
    assert before.count(b"\n") == 8
    with out.open("a", encoding="utf-8") as cut:
        cut.write('{"task_id": "three2", "ta')
    assert ask(*words, "--dry-run").stdout.startswith("would predict 4 of 12 conversations; 8 have a prediction")
    counts.clear()
    predict_cohort(read_cohort(learnt, settings, load_checkpoint_settings(learnt, None)), progress)
    assert counts == [0, 1, 2, 3]
    assert out.read_bytes().startswith(before)

    found, model = read_predictions(out), Umbrella.from_checkpoint(learnt, device="cpu")
    in_one_go = [model.predict([c], candidates, ["T3"], truth=False, max_new_tokens=32)[0] for c in cohort]
    for one, other in zip(found, in_one_go, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        assert replace(one, probabilities={}) == replace(other, probabilities={})
    assert [p.text for p in found] == model.answer(cohort) == ["male.", "Hello, you.", "Seen. And 2 more, é."] * 4
    assert (found[0].probabilities["male"] > 0.9, found[1].probabilities) == (True, {})

    assert "12 of 12 conversations have a prediction already" in ask(*words).stdout
    write_questions(file, cohort[1:])
    done = ask(*words)
    assert (done.status, len(done.stderr.splitlines())) == (2, 1)
    assert f"data.input={file} has changed since; give another output" in done.stderr
