"""Scores of answers by their likelihood."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import make_conversation
from umbrella.base import UserError
from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Collator
from umbrella.data.rendering import Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.evaluation.candidates import check_candidates, find_candidates
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.scoring import find_branchings, score

SEX = {"T2": {"female": "female.", "male": "male."}}
"""The cohort's conversation "two" names no target, so its task type is the target."""


@pytest.fixture
def collate(store: Any, tokenizer: Any) -> Collator:
    return Collator(Renderer(tokenizer, store.modalities), store)


@pytest.fixture
def scores(collate: Collator) -> Callable[..., list[Prediction]]:
    return lambda model, conversations, candidates, **options: score(
        model, conversations, collate.renderer, collate, candidates, **options
    )


def labelled(answer: str, label: Any, target: str = "sex") -> Conversation:
    metadata = {"subject_label": label, "target": target}
    return make_conversation(("user", "?"), ("assistant", answer), metadata=metadata)


def test_candidates_are_the_most_frequent_answer_of_each_label() -> None:
    conversations = [
        labelled("A man.", "male"),
        labelled("male.", "male"),
        labelled("male.", "male"),
        labelled("female.", "female"),
        labelled("63 years.", 63, "age"),  # a number
        labelled("CN.", "CN", "diagnosis"),  # one class only
        make_conversation(("user", "Hi"), ("assistant", "Hello")),
    ]
    candidates = find_candidates(conversations)
    assert candidates == {"sex": {"female": "female.", "male": "male."}}
    check_candidates([labelled("m", "male"), labelled("63", 63, "age"), conversations[-1]], candidates)
    with pytest.raises(UserError, match=r"t: its label 'other' of 'sex' does not occur .* \(female, male\)"):
        check_candidates([labelled("o", "other")], candidates)
    with pytest.raises(UserError, match=r"its label 'CN' of 'diagnosis' .* \(no classes\)"):
        check_candidates([labelled("CN.", "CN", "diagnosis")], candidates)


def test_probabilities_are_renormalised_where_the_tokens_of_the_candidates_branch(
    build: Callable[..., Any],
    cohort: dict[str, Conversation],
    collate: Collator,
    scores: Callable[..., list[Prediction]],
) -> None:
    model, two = build().eval(), cohort["two"]
    logits, answer = {}, {}
    for label, text in SEX["T2"].items():
        batch = collate([collate.renderer.render(two, text)], MaskPolicy(supervise="all"))
        with torch.no_grad():
            full = model(batch.input_ids, batch.attention_mask, batch.pixel_values).logits[0]
        tokens = len(text) + 2  # a token per letter, <|im_end|> and the line break
        logits[label], answer[label] = full[-tokens - 1 : -1].double(), batch.input_ids[0, -tokens:]
    nll = -logits["male"].log_softmax(-1).gather(1, answer["male"][:, None]).sum()
    first = logits["male"][0, [answer["female"][0], answer["male"][0]]]  # "f" or "m"

    [_, scored, number] = scores(model, [cohort["none"], two, cohort["three"]], SEX)
    assert (scored.answer_nll, scored.answer_tokens) == (pytest.approx(nll.item(), abs=1e-4), 7)
    assert list(scored.probabilities) == ["female", "male"]
    assert list(scored.probabilities.values()) == pytest.approx(first.softmax(0).tolist(), abs=1e-5)
    assert (scored.subject_id, scored.label, scored.target) == ("a", "male", "T2")
    without, _, _ = scores(model, [two, cohort["none"], cohort["three"]], SEX, truth=False)
    assert without.probabilities == pytest.approx(scored.probabilities)
    assert (without.truth, without.answer_nll, without.answer_tokens) == ("", None, 0), "the last answer is not read"
    # A number has no candidates, but the likelihood of its text: "63.5" and the end.
    assert (number.probabilities, number.answer_tokens) == ({}, 6)

    # "m" ends where "ma" continues: "f" or "m", and then the end of the turn or "a".
    [nested] = scores(model, [two], {"T2": {"m": "m", "ma": "ma", "female": "female."}})
    second = logits["male"][1, [answer["male"][-2], answer["male"][1]]].softmax(0).tolist()
    female, m = first.softmax(0).tolist()
    expected = {"m": m * second[0], "ma": m * second[1], "female": female}
    assert nested.probabilities == pytest.approx(expected, abs=1e-5)
    assert sum(nested.probabilities.values()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("sequences", "branchings"),
    [
        ({}, []),
        ({0: [1, 2, 9], 1: [1, 3, 9]}, [(1, [[0], [1]])]),
        ({0: [1, 2], 1: [1, 2]}, []),
        ({0: [1], 1: [1, 2]}, []),
        (
            {7: [1, 2, 9], 8: [1, 2, 3, 9], 9: [4], 6: [1, 5]},
            [(0, [[7, 8, 6], [9]]), (1, [[7, 8], [6]]), (2, [[7], [8]])],
        ),
    ],
)
def test_branchings_are_where_tokens_differ_after_equal_ones(sequences: Any, branchings: Any) -> None:
    assert find_branchings(sequences) == branchings


@pytest.mark.parametrize("taught", ["yes", "no"])
def test_a_long_answer_is_not_penalised(
    build: Callable[..., Any],
    cohort: dict[str, Conversation],
    collate: Collator,
    scores: Callable[..., list[Prediction]],
    teach: Callable[..., None],
    taught: str,
) -> None:
    model, two = build(), cohort["two"]
    answers = {"yes": "yes.", "no": "there is no sign of it in this image as far as one can tell."}
    batch = collate([collate.renderer.render(two, answers[taught])], MaskPolicy())
    teach(model, batch, 3)
    [scored] = scores(model.eval(), [two], {"T2": answers})
    prompt = collate([collate.renderer.prompt(two)], MaskPolicy())
    with torch.no_grad():
        next_token = model(prompt.input_ids, prompt.attention_mask, prompt.pixel_values).logits[0, -1].softmax(-1)
    yes, there = next_token[collate.renderer.tokenizer.convert_tokens_to_ids(["y", "t"])].tolist()
    assert scored.probabilities == pytest.approx({"yes": yes / (yes + there), "no": there / (yes + there)}, abs=1e-5)
    assert scored.probabilities[taught] > 0.5
    assert model(**batch.model_inputs()).token_nll.sum() > 10, "it is hardly learnt"
