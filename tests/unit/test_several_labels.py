"""Several labels in one conversation: the format, its checks, and what is trained, scored and reported."""

from typing import Any

import pytest

from tests.unit.samples import changed
from tests.unit.test_conversation import parse, problems
from umbrella.conversations.schema import Conversation, most_frequent_answers

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
