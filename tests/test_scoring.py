"""Scores of answers: likelihoods of whole texts under the model, not the finding of words in other words."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from umbrella.base import UserError
from umbrella.conversations.conversation import Conversation
from umbrella.data.batching import Batch, collate
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.evaluation.prediction import Prediction
from umbrella.evaluation.scoring import check_candidates, find_candidates, score
from umbrella.modality import Modality

Talk = Callable[..., Conversation]
SEX = {"T2": {"female": "female.", "male": "male."}}
"""The cohort's conversation "two" names no target, so its task type is the target."""


@pytest.fixture
def renderer(tokenizer: Any, modalities: dict[str, Modality]) -> Renderer:
    return Renderer(tokenizer, modalities)


@pytest.fixture
def scores(renderer: Renderer, store: Any, tokenizer: Any) -> Callable[..., list[Prediction]]:
    def make(examples: Sequence[Example], policy: MaskPolicy) -> Batch:
        return collate(examples, policy, store, renderer.image_id, tokenizer.pad_token_id)

    return lambda model, conversations, candidates, **how: score(
        model, conversations, renderer, make, candidates, **how
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


def test_a_candidate_is_as_likely_as_its_tokens_are_in_the_full_logits(
    build: Callable[..., Any],
    cohort: dict[str, Conversation],
    renderer: Renderer,
    scores: Callable[..., list[Prediction]],
    store: Any,
) -> None:
    model = build().eval()
    two = cohort["two"]
    by_hand = {}
    for label, text in SEX["T2"].items():
        example = renderer.render(two, text)
        batch = collate([example], MaskPolicy(supervise="all"), store, renderer.image_id, 0)
        with torch.no_grad():
            logits = model(batch.input_ids, batch.attention_mask, batch.pixel_values).logits[0]
        answer = len(text) + 2  # a token per letter, <|im_end|> and the line break
        targets = batch.input_ids[0, -answer:, None]
        by_hand[label] = logits[-answer - 1 : -1].log_softmax(-1).gather(1, targets).double().sum()

    [_, scored, number] = scores(model, [cohort["none"], two, cohort["three"]], SEX)
    assert (scored.answer_nll, scored.answer_tokens) == (pytest.approx(-by_hand["male"].item(), abs=1e-4), 7)
    expected = torch.stack([by_hand["female"], by_hand["male"]]).softmax(0).tolist()
    assert list(scored.probabilities) == ["female", "male"]
    assert list(scored.probabilities.values()) == pytest.approx(expected, abs=1e-4)
    assert sum(scored.probabilities.values()) == pytest.approx(1, abs=1e-9)
    assert (scored.subject_id, scored.label, scored.target) == ("a", "male", "T2")
    untold, _, _ = scores(model, [two, cohort["none"], cohort["three"]], SEX, truth=False)
    assert untold.probabilities == pytest.approx(scored.probabilities)
    assert (untold.truth, untold.answer_nll, untold.answer_tokens) == ("", None, 0), "what stands there is not read"
    shorter = {"T2": {"male": "m", "female": "female."}}
    (per_text,), (per_token,) = (scores(model, [two], shorter, length_normalised=yes) for yes in (False, True))
    ratio = [one.probabilities["male"] / one.probabilities["female"] for one in (per_text, per_token)]
    long, short = -by_hand["female"].item(), -torch.tensor(ratio[0]).log().item() - by_hand["female"].item()
    assert ratio[1] == pytest.approx(math.exp(long / 9 - short / 3), rel=1e-3)  # with the end and the line break
    # A number has no candidates, and is still as likely as its own text: "63.5" and the end.
    assert (number.probabilities, number.answer_tokens) == ({}, 6)


@pytest.mark.parametrize("taught", ["female", "male"])
def test_a_model_that_says_female_has_not_said_male(
    build: Callable[..., Any],
    cohort: dict[str, Conversation],
    renderer: Renderer,
    scores: Callable[..., list[Prediction]],
    store: Any,
    taught: str,
) -> None:
    model = build()
    example = renderer.render(cohort["two"], f"{taught}.")
    batch = collate([example], MaskPolicy(), store, renderer.image_id, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**batch.model_inputs()).token_nll.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    [scored] = scores(model.eval(), [cohort["two"]], SEX)
    assert scored.probabilities[taught] > 0.95
