"""Several labels in one conversation: the format, its checks, and what is trained, scored and reported."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.conftest import untrained_model
from tests.unit.samples import changed
from tests.unit.test_conversation import parse, problems
from tests.unit.test_splits import lines, plain, read, settings_of, write
from umbrella.base import UserError
from umbrella.config import Settings, load_settings
from umbrella.conversations.schema import Conversation, most_frequent_answers, questions_of
from umbrella.data.ingest import load_splits
from umbrella.data.splits import Splits
from umbrella.evaluation.candidates import find_candidates
from umbrella.evaluation.group_metrics import Estimate, tabulate
from umbrella.evaluation.metrics import validation_metrics
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.report import AS_ASKED, EvaluationResult, print_evaluation, write_report
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.training.run import check_data

LABELS = [{"turn": 3, "target": "age", "label": 43}, {"turn": 1, "target": "sex", "label": "male"}]
TURNS = ("Sex?", "male.", "Age?", "43 years.", "Diagnosis?", "CN.")
RAW = {
    "task_id": "s1",
    "conversations": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(TURNS)],
    "metadata": {"subject_id": "s1", "site": "A", "labels": LABELS, "subject_label": "CN", "target": "diagnosis"},
}


def asked(conversation: Conversation) -> list[tuple[str, str, Any, str]]:
    return [(q.task_id, q.target, q.label, q.answer) for q in conversation.questions()]


def test_each_label_is_a_question_that_ends_with_its_turn() -> None:
    conversation = parse(RAW)
    assert asked(conversation) == [
        ("s1:1:sex", "sex", "male", "male."),
        ("s1:3:age", "age", 43, "43 years."),
        ("s1:5:diagnosis", "diagnosis", "CN", "CN."),
    ]
    for question in conversation.questions():
        read = Conversation.model_validate_json(question.model_dump_json())
        assert (read.conversation_id, read.subject_id, read.metadata["site"]) == ("s1", "s1", "A")
        assert read.questions() == [read]
    assert [q.asked_before for q in conversation.questions()] == [[], [1], [1, 3]]
    alone = parse(changed(RAW, {"metadata.labels": ...}))
    assert (alone.questions(), alone.conversation_id, alone.asked_before) == ([alone], "s1", [])
    # A subject_label that is among the entries is one question.
    entry = {"turn": 5, "target": "diagnosis", "label": "CN"}
    assert asked(parse(changed(RAW, {"metadata.labels": [entry]}))) == asked(conversation)[2:]


def test_turns_are_counted_as_the_file_has_them() -> None:
    raw = RAW | {"system": "Be brief."}
    assert [q.answer for q in parse(raw).questions()] == ["male.", "43 years.", "CN."]
    assert raw["metadata"]["labels"] == LABELS
    chat = {"id": "s1", "messages": RAW["conversations"], "metadata": RAW["metadata"]}
    assert asked(parse(chat)) == asked(parse(RAW))


LABEL = "metadata.labels.0"
INVALID: dict[str, Any] = {
    "metadata.labels: must be a list of {turn, target, label}, not 'sex'": "sex",
    f"{LABEL}: must be an object of turn, target and label, not 'sex'": ["sex"],
    f"{LABEL}: must be an object of turn, target and label, not {{'target': 'sex', 'turn': 1}}": [
        {"turn": 1, "target": "sex"}
    ],
    f"{LABEL}.turn: 6 is no index of a turn, 0 to 5": [{"turn": 6, "target": "sex", "label": "male"}],
    f"{LABEL}.turn: -1 is no index of a turn, 0 to 5": [{"turn": -1, "target": "sex", "label": "male"}],
    f"{LABEL}.turn: true is no index of a turn, 0 to 5": [{"turn": True, "target": "sex", "label": "male"}],
    f"{LABEL}.turn: 2 is a user turn; give the index of the answer, counted from 0": [
        {"turn": 2, "target": "sex", "label": "male"}
    ],
    f"{LABEL}.target: must be a name, not ' '": [{"turn": 1, "target": " ", "label": "male"}],
    f"{LABEL}.label: must be a text or a finite number, not ['male']": [
        {"turn": 1, "target": "sex", "label": ["male"]}
    ],
    f"{LABEL}.label: is empty; write the label, or leave it out": [{"turn": 1, "target": "sex", "label": ""}],
    "metadata.labels.2: turn 1 has a label of 'sex' already; leave one out": [*LABELS, LABELS[1]],
    "metadata.subject_label: is 'CN', and `metadata.labels` has 'AD' for this answer; correct one of them": [
        {"turn": 5, "target": "diagnosis", "label": "AD"}
    ],
}


@pytest.mark.parametrize("line", INVALID)
def test_an_invalid_label_is_an_error_that_names_the_entry(line: str) -> None:
    for raw in (RAW, RAW | {"system": "Be brief."}):
        assert problems(changed(raw, {"metadata.labels": INVALID[line]})) == [line]


def test_each_label_has_candidates_from_its_own_turn() -> None:
    other = changed(RAW, {"metadata.labels.1.label": "female", "conversations.1.content": "female."})
    assert most_frequent_answers([parse(RAW), parse(other)]) == {
        "sex": {"male": "male.", "female": "female."},
        "age": {43: "43 years."},
        "diagnosis": {"CN": "CN."},
    }


def of_subject(subject: str, sex: str, diagnosis: str) -> dict[str, Any]:
    """A conversation with two class labels and a number."""
    turns = {"metadata.labels.1.label": sex, "conversations.1.content": f"{sex}."}
    last = {"metadata.subject_label": diagnosis, "conversations.5.content": f"{diagnosis}."}
    return changed(RAW, {"task_id": subject, "metadata.subject_id": subject} | turns | last)


COHORT = [of_subject("a", "male", "CN"), of_subject("b", "female", "AD"), of_subject("c", "female", "CN")]


def test_training_takes_whole_conversations_and_validation_asks_each_question(tmp_path: Path) -> None:
    write(tmp_path / "data", train=COHORT, validation=[of_subject("d", "male", "AD"), of_subject("e", "male", "CN")])
    splits = load_splits(settings_of(tmp_path / "data"), plain, dry_run=True)
    assert [len(c.conversations) for c in splits.train] == [6, 6, 6]
    # Batches by length would have one label each if labelled answers had a share in it.
    assert len(set(splits.lengths["train"])) == 1
    assert len(splits.lengths["validation"]) == len(questions_of(splits.validation)) == 6


def test_each_answer_is_compared_with_its_label(tmp_path: Path) -> None:
    wrong = changed(of_subject("d", "male", "AD"), {"conversations.1.content": "female."})
    write(tmp_path, train=[*COHORT, of_subject("f", "male", "AD")], validation=[wrong])
    assert lines(read(tmp_path), tmp_path) == [
        "validation.jsonl:1: metadata.labels: the label is 'male', but the answer 'female.' is that of the label"
        " 'female'; correct one of them"
    ]


def test_earlier_answers_are_true_ones_for_candidates_and_own_ones_for_generation(
    build: Callable[..., Any], store: Any, tokenizer: Any
) -> None:
    model = untrained_model(build, store, tokenizer)
    candidates = find_candidates(map(parse, COHORT))
    predictions = model.predict(parse(COHORT[0]).questions(), candidates, {"age"}, max_new_tokens=6)
    chat = model.chat()
    assert [p.text for p in predictions] == [chat.ask(text, max_new_tokens=6) for text in TURNS[::2]]
    # The third question alone, after turns without a label, which are kept as they are written.
    alone = [parse(changed(COHORT[0], {"metadata.labels": ...}))]
    [scored] = model.predict(alone, candidates, max_new_tokens=6)
    assert scored.probabilities == pytest.approx(predictions[2].probabilities)
    assert scored.text == model.answer(alone, max_new_tokens=6)[0] != predictions[2].text


def answered(wrong: Sequence[str] = ()) -> list[Prediction]:
    """Predictions of the cohort, all right but those that are named."""
    made = []
    for p in map(Prediction.from_conversation, questions_of(map(parse, COHORT))):
        shares = {"sex": {"male": 0.0, "female": 0.0}, "diagnosis": {"AD": 0.0, "CN": 0.0}}.get(p.target, {})
        chosen = next((name for name in shares if name != p.label), None) if p.task_id in wrong else p.label
        probabilities = {name: float(name == chosen) for name in shares}
        made.append(
            replace(p, probabilities=probabilities, text=p.truth, predicted=p.label, answer_nll=1.0, answer_tokens=1)
        )
    return made


def test_the_share_of_conversations_in_which_all_answers_are_right_is_a_metric(tmp_path: Path) -> None:
    rows = answered(wrong=["b:1:sex", "b:5:diagnosis"])
    *each, joint = tabulate(rows, EvaluateSettings(bootstrap=100))
    assert [group.target for group in each if group.by == "all"] == ["age", "diagnosis", "sex"]
    assert (joint.target, joint.kind, joint.conversations, joint.subjects) == ("all_targets", "joint", 3, 3)
    share = joint.metrics["likelihood/conversations/subset_accuracy"]
    assert share.value == pytest.approx(2 / 3)
    assert share.low < share.value < share.high == 1
    assert joint.metrics["generated/conversations/subset_accuracy"] == Estimate(1, 1, 1)
    metrics = validation_metrics(rows)
    assert metrics["eval/subset_accuracy"] == pytest.approx(2 / 3)
    assert {"eval/sex/balanced_accuracy", "eval/diagnosis/balanced_accuracy"} <= metrics.keys()
    # A control may leave out a question, and so its conversation.
    assert tabulate(rows[1:], EvaluateSettings(bootstrap=100))[-1].conversations == 2
    for target in ("age", "sex"):
        only = [p for p in rows if p.target == target]
        assert [group.kind for group in tabulate(only, EvaluateSettings(bootstrap=100)) if group.kind == "joint"] == []
        assert "eval/subset_accuracy" not in validation_metrics(only)


def test_the_report_has_each_target_and_the_share(tmp_path: Path) -> None:
    rows = answered(wrong=["b:1:sex"])
    groups = {AS_ASKED: tabulate(rows, EvaluateSettings(bootstrap=100))}
    result = EvaluationResult(Settings(), "/m/step_1", "test", {AS_ASKED: rows}, groups, {})
    page = write_report(tmp_path, result, ())
    html = page.read_text(encoding="utf-8")
    assert "<b>3</b>conversations" in html
    assert "<b>3</b>targets" in html
    assert "all of these answers are right" in html
    shown = StringIO()
    print_evaluation(result, page, Console(file=shown, width=200))
    assert "test: 3 conversations" in shown.getvalue()
    [line] = [line for line in shown.getvalue().splitlines() if "subset accuracy, likelihood" in line]
    assert "all_targets" in line
    assert "0.667" in line


def test_a_sweep_on_several_targets_names_its_metric() -> None:
    conversations = [parse(raw) for raw in COHORT]
    splits = Splits({"train": conversations, "validation": conversations})
    check_data(load_settings(), splits)  # one training has nothing to rank
    with pytest.raises(UserError) as caught:
        check_data(load_settings(), splits, [load_settings()])
    assert str(caught.value) == (
        "tune.metric=eval/balanced_accuracy: is the mean over diagnosis, sex; name the one that ranks the trials:"
        " eval/loss, eval/subset_accuracy, eval/diagnosis/balanced_accuracy, eval/diagnosis/accuracy,"
        " eval/sex/balanced_accuracy, eval/sex/accuracy"
    )
    for metric in ("eval/sex/balanced_accuracy", "eval/subset_accuracy"):
        named = load_settings(overrides={"tune.metric": metric})
        check_data(named, splits, [named])
    one = Splits({"train": conversations, "validation": [q for q in questions_of(conversations) if q.target == "sex"]})
    check_data(load_settings(), one, [load_settings()])
