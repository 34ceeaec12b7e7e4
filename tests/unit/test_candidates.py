"""Candidates of a sample: multiple-choice questions are read, checked, scored, and judged by their accuracy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from tests.conftest import make_conversation, make_prediction
from tests.unit.samples import changed, sample, write_lines
from umbrella.base import UserError
from umbrella.config import Settings
from umbrella.conversations.reading import read_conversations
from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Collator
from umbrella.data.rendering import Renderer
from umbrella.evaluation.candidates import check_candidates, find_candidates
from umbrella.evaluation.group_metrics import Group, tabulate
from umbrella.evaluation.metrics import validation_metrics
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.report import AS_ASKED, EvaluationResult, main_metrics, write_report
from umbrella.evaluation.scoring import score
from umbrella.evaluation.settings import EvaluateSettings

OPTIONS = {"A": "A. atrophy", "B": "B. tumour", "C": "C. stroke"}
CHOICE = changed(sample(), {"metadata": {"subject_id": "t", "subject_label": "A", "candidates": OPTIONS}})
FEW = EvaluateSettings(bootstrap=100)


def read(folder: Path, *raw: Any) -> list[Conversation]:
    reading = read_conversations(write_lines(folder / "c.jsonl", *raw), check_files=False)
    if reading.problems:
        raise UserError("\n".join(map(str, reading.problems)))
    return reading.conversations


def choice(options: Any, label: str, target: str = "finding") -> Conversation:
    metadata = {"subject_label": label, "target": target, "candidates": options}
    return make_conversation(("user", "Which one?"), ("assistant", "?"), metadata=metadata)


def test_candidates_are_a_mapping_or_a_list_whose_texts_are_the_labels(tmp_path: Path) -> None:
    texts = changed(CHOICE, {"task_id": "u", "metadata.candidates": ["CN", "AD"], "metadata.subject_label": "AD"})
    assert [c.candidates for c in read(tmp_path, CHOICE, texts)] == [OPTIONS, {"CN": "CN", "AD": "AD"}]
    (plain,) = read(tmp_path, sample())
    assert plain.candidates == {}


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ("AB", "must be a list of texts, or an object of label and text, not 'AB'"),
        ({"A": 1, "B": "b"}, "must be a list of texts, or an object of label and text, not"),
        ({"A": "a"}, "has 1 of the two or more answers to choose from; add the others"),
        (
            {"A": "x", "B": "X "},
            "has two that are equal, or differ by case or blanks only; give each a text of its own",
        ),
        (["B", "C"], "lacks the label 'A', it has 'B', 'C'; add it, or write one of these as the label"),
    ],
)
def test_bad_candidates_are_named_with_file_line_field_and_remedy(
    tmp_path: Path, candidates: Any, message: str
) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, sample("a"), changed(CHOICE, {"metadata.candidates": candidates}))
    assert f"c.jsonl:2: metadata.candidates: {message}" in str(error.value)
    entry = {"turn": 1, "target": "finding", "label": "A", "candidates": candidates}
    with pytest.raises(UserError) as error:
        read(tmp_path, changed(sample(), {"metadata": {"labels": [entry]}}))
    assert f"c.jsonl:1: metadata.labels.0.candidates: {message}" in str(error.value)


def test_each_label_has_its_own_candidates(tmp_path: Path) -> None:
    labels = [
        {"turn": 1, "target": "finding", "label": "A", "candidates": OPTIONS},
        {"turn": 1, "target": "sex", "label": "male"},
    ]
    side = {"subject_label": "left", "target": "side", "candidates": ["left", "right"]}
    (sample_,) = read(tmp_path, changed(sample(), {"metadata": side | {"labels": labels}}))
    found = {q.target: q.candidates for q in sample_.questions()}
    assert found == {"finding": OPTIONS, "sex": {}, "side": {"left": "left", "right": "right"}}


def test_own_candidates_are_scored_and_need_no_training_answers(build: Any, store: Any, tokenizer: Any) -> None:
    samples = [choice(OPTIONS, "B"), choice(["left", "right", "both", "none"], "both")]
    assert find_candidates(samples) == {}
    check_candidates(samples, {})
    renderer = Renderer(tokenizer, store.modalities)
    first, second = score(build().eval(), samples, renderer, Collator(renderer, store), {"finding": {"x": "x"}})
    assert list(first.probabilities) == ["A", "B", "C"]
    assert list(second.probabilities) == ["left", "right", "both", "none"]
    assert sum(second.probabilities.values()) == pytest.approx(1)


def answered(i: int, label: str, answer: str, options: Any = ("A", "B", "C", "D"), subject: str = "") -> Prediction:
    shares = {option: 0.7 if option == answer else 0.3 / (len(options) - 1) for option in options}
    metadata = {"candidates": list(options)}
    fields = {"task_id": f"q{i}", "target": "finding", "probabilities": shares, "metadata": metadata}
    return make_prediction(subject or f"s{i // 2}", label, text=answer, predicted=answer, **fields)


TRUE, ANSWERS = "ABCDABCDABAA", "AAADAACDAAAA"


def planted() -> list[Prediction]:
    return [answered(i, *pair) for i, pair in enumerate(zip(TRUE, ANSWERS, strict=True))]


def test_choices_have_accuracy_over_conversations_and_subjects_and_label_frequencies() -> None:
    (group,) = tabulate(planted(), FEW)
    values = {name: estimate.value for name, estimate in group.metrics.items()}
    for way in ("likelihood", "generated"):
        assert values[f"{way}/conversations/accuracy"] == pytest.approx(accuracy_score([*TRUE], [*ANSWERS]))
        balanced = balanced_accuracy_score([*TRUE], [*ANSWERS])
        assert values[f"{way}/conversations/balanced_accuracy"] == pytest.approx(balanced)
    assert values["likelihood/subjects/accuracy"] == pytest.approx((0.5 + 0.5 + 0.5 + 1 + 0.5 + 1) / 6)
    assert main_metrics(group) == ["likelihood/subjects/accuracy", "generated/subjects/accuracy"]
    assert group.frequencies["true"] == {"A": 5, "B": 3, "C": 2, "D": 2}
    assert group.frequencies["likelihood"] == {"A": 9, "D": 2, "C": 1}
    assert group.references == {"chance": 0.25, "majority": pytest.approx(5 / 12)}


def test_classes_may_differ_per_sample_however_many_there_are() -> None:
    many = [answered(i, f"x{i}", f"x{i if i % 4 else i + 1}", (f"x{i}", f"x{i + 1}")) for i in range(2000)]
    (group,) = tabulate(many, FEW)
    assert group.metrics["likelihood/conversations/accuracy"].value == pytest.approx(0.75)
    assert np.isnan(group.metrics["likelihood/conversations/balanced_accuracy"].value)
    assert group.references["chance"] == 0.5
    assert validation_metrics(many)["eval/finding/balanced_accuracy"] == pytest.approx(0.75)


def test_references_of_choices_are_means_over_subjects_as_the_accuracy_is() -> None:
    rows = [answered(i, "A", "A", "AB", subject="s") for i in range(3)] + [answered(3, "B", "A", subject="t")]
    (group,) = tabulate(rows, FEW)
    assert group.metrics["likelihood/subjects/accuracy"].value == group.references["majority"] == 0.5
    assert group.references["chance"] == (1 / 2 + 1 / 4) / 2


def test_questions_of_one_subject_are_not_averaged_in_the_validation() -> None:
    rows = [answered(0, "A", "A", subject="s"), answered(1, "A", "B", subject="s"), answered(2, "B", "B", subject="s")]
    assert validation_metrics(rows)["eval/finding/balanced_accuracy"] == pytest.approx((0.5 + 1) / 2)


def test_the_report_shows_the_floor_without_images_and_the_frequencies(tmp_path: Path) -> None:
    floor = [replace(p, probabilities=answered(0, "A", "A").probabilities) for p in planted()]
    rows = {AS_ASKED: planted(), "text_only": floor}
    groups: dict[str, list[Group]] = {name: tabulate(of_one, FEW) for name, of_one in rows.items()}
    page = write_report(tmp_path, EvaluationResult(Settings(), "/m/step_1", "test", rows, groups, {}), ())
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert "own volumes 0.667 (" in text
    assert "text only 0.417 (" in text
    assert '<td class="subgroup">A</td> <td class="n">5 (42%)</td><td class="n">9 (75%)</td>' in text
