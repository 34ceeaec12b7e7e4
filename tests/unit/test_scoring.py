"""Scores of answers: likelihoods of whole texts under the model, not the finding of words in other words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from umbrella.base import UserError
from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Collator
from umbrella.data.rendering import Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.scoring import check_candidates, find_branchings, find_candidates, score
from umbrella.modality import Modality

Talk = Callable[..., Conversation]
SEX = {"T2": {"female": "female.", "male": "male."}}
"""The cohort's conversation "two" names no target, so its task type is the target."""


@pytest.fixture
def renderer(tokenizer: Any, modalities: dict[str, Modality]) -> Renderer:
    return Renderer(tokenizer, modalities)


@pytest.fixture
def scores(renderer: Renderer, store: Any, tokenizer: Any) -> Callable[..., list[Prediction]]:
    collate = Collator(renderer, store)
    return lambda model, conversations, candidates, **how: score(
        model, conversations, renderer, collate, candidates, **how
    )


def said(talk: Talk, answer: str, label: Any, target: str = "sex") -> Conversation:
    return talk(("user", "?"), ("assistant", answer), metadata={"subject_label": label, "target": target})


def test_a_label_is_said_in_its_most_frequent_words_of_the_training_data(talk: Talk) -> None:
    conversations = [
        said(talk, "A man.", "male"),
        said(talk, "male.", "male"),
        said(talk, "male.", "male"),
        said(talk, "female.", "female"),
        said(talk, "63 years.", 63, "age"),  # numbers are no classes
        said(talk, "CN.", "CN", "diagnosis"),  # and one class is nothing to choose from
        talk(("user", "Hi"), ("assistant", "Hello")),
    ]
    assert find_candidates(conversations) == {"sex": {"female": "female.", "male": "male."}}


def test_a_label_that_the_training_data_never_say_is_named(talk: Talk) -> None:
    candidates = {"sex": {"female": "female.", "male": "male."}}
    check_candidates([said(talk, "m", "male"), said(talk, "63", 63, "age"), talk(("assistant", "Hi"))], candidates)
    with pytest.raises(UserError, match=r"t: its label 'other' of 'sex' does not occur .* \(female, male\)"):
        check_candidates([said(talk, "o", "other")], candidates)
    with pytest.raises(UserError, match=r"its label 'CN' of 'diagnosis' .* \(no classes\)"):
        check_candidates([said(talk, "CN.", "CN", "diagnosis")], candidates)


def test_candidates_share_what_is_likely_where_their_tokens_branch(
    build: Callable[..., Any],
    cohort: dict[str, Conversation],
    renderer: Renderer,
    scores: Callable[..., list[Prediction]],
    store: Any,
) -> None:
    model = build().eval()
    two = cohort["two"]
    logits, answer = {}, {}
    for label, text in SEX["T2"].items():
        example = renderer.render(two, text)
        batch = Collator(renderer, store)([example], MaskPolicy(supervise="all"))
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
    untold, _, _ = scores(model, [two, cohort["none"], cohort["three"]], SEX, truth=False)
    assert untold.probabilities == pytest.approx(scored.probabilities)
    assert (untold.truth, untold.answer_nll, untold.answer_tokens) == ("", None, 0), "the last answer is not read"
    # A number has no candidates, and is still as likely as its own text: "63.5" and the end.
    assert (number.probabilities, number.answer_tokens) == ({}, 6)

    # "m" ends where "ma" goes on: "f" or "m", and then the end of the turn or "a".
    nested = {"T2": {"m": "m", "ma": "ma", "female": "female."}}
    [among] = scores(model, [two], nested)
    second = logits["male"][1, [answer["male"][-2], answer["male"][1]]].softmax(0).tolist()
    female, m = first.softmax(0).tolist()
    expected = {"m": m * second[0], "ma": m * second[1], "female": female}
    assert among.probabilities == pytest.approx(expected, abs=1e-5)
    assert sum(among.probabilities.values()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("sequences", "branchings"),
    [
        ({}, []),
        ({4: [1, 2]}, []),
        ({0: [1, 2, 9], 1: [1, 3, 9]}, [(1, [[0], [1]])]),
        ({0: [1, 2], 1: [1, 2]}, []),
        ({0: [1], 1: [1, 2]}, []),
        (
            {7: [1, 2, 9], 8: [1, 2, 3, 9], 9: [4], 6: [1, 5]},
            [(0, [[7, 8, 6], [9]]), (1, [[7, 8], [6]]), (2, [[7], [8]])],
        ),
    ],
)
def test_branchings_are_where_tokens_differ_after_the_same_beginning(sequences: Any, branchings: Any) -> None:
    assert find_branchings(sequences) == branchings


@pytest.mark.parametrize("taught", ["yes.", "there is no sign of it in this image as far as one can tell."])
def test_a_long_answer_that_is_hardly_learnt_is_as_likely_as_it_is_generated(
    build: Callable[..., Any],
    cohort: dict[str, Conversation],
    renderer: Renderer,
    scores: Callable[..., list[Prediction]],
    store: Any,
    teach: Callable[..., None],
    tokenizer: Any,
    taught: str,
) -> None:
    model = build()
    batch = Collator(renderer, store)([renderer.render(cohort["two"], taught)], MaskPolicy())
    teach(model, batch, 3)
    answers = {"yes": "yes.", "no": "there is no sign of it in this image as far as one can tell."}
    [scored] = scores(model.eval(), [cohort["two"]], {"T2": answers})
    prompt = renderer.prompt(cohort["two"])
    asked = Collator(renderer, store)([prompt], MaskPolicy())
    with torch.no_grad():
        next_token = model(asked.input_ids, asked.attention_mask, asked.pixel_values).logits[0, -1].softmax(-1)
    yes, there = next_token[tokenizer.convert_tokens_to_ids(["y", "t"])].tolist()
    assert scored.probabilities == pytest.approx({"yes": yes / (yes + there), "no": there / (yes + there)}, abs=1e-5)
    label = next(label for label, text in answers.items() if text == taught)
    assert scored.probabilities[label] > 0.5
    assert model(**batch.model_inputs()).token_nll.sum() > 10, "it is hardly learnt"


@pytest.mark.parametrize("taught", ["female", "male"])
def test_a_model_that_says_female_has_not_said_male(
    build: Callable[..., Any],
    cohort: dict[str, Conversation],
    renderer: Renderer,
    scores: Callable[..., list[Prediction]],
    store: Any,
    teach: Callable[..., None],
    taught: str,
) -> None:
    model = build()
    example = renderer.render(cohort["two"], f"{taught}.")
    batch = Collator(renderer, store)([example], MaskPolicy())
    teach(model, batch, 60)
    [scored] = scores(model.eval(), [cohort["two"]], SEX)
    assert scored.probabilities[taught] > 0.95
