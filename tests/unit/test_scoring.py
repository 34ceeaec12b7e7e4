"""Scores of answers by their likelihood."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import make_conversation
from umbrella.base import UserError
from umbrella.config import load_settings
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


def test_numbers_have_a_grid_of_the_range_and_decimals_of_the_training_labels() -> None:
    ages = [labelled(f"About {age} years.", age, "age") for age in (20, 23, 21)]
    scores = [labelled(f"{score:.1f}", score, "score") for score in (0.5, 2.0)]
    words = [labelled("sixty", 60, "spelt")]
    found = find_candidates([*ages, *scores, *words])
    assert found["age"] == {float(age): f"About {age} years." for age in range(20, 24)}
    assert list(found["score"].items())[:2] == [(0.5, "0.5"), (0.6, "0.6")]
    assert (len(found["score"]), "spelt" in found) == (16, False)
    given = find_candidates(ages, {"age": (0, 100, 25)})
    assert list(given["age"]) == [0, 25, 50, 75, 100]
    wide = find_candidates([labelled(str(volume), volume, "volume") for volume in (1000, 2000)])["volume"]
    assert (len(wide), list(wide)[1]) == (201, 1005), "at most 200 steps"


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
    # A number without a grid has the likelihood of its text: "63.5" and the end.
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
        ([], {}),
        ([(1, 2, 9), (1, 3, 9)], {(1,): {2: [0], 3: [1]}}),
        ([(1, 2), (1, 2)], {}),
        ([(1,), (1, 2)], {}),
        (
            [(1, 2, 9), (1, 2, 3, 9), (4,), (1, 5)],
            {(): {1: [0, 1, 3], 4: [2]}, (1,): {2: [0, 1], 5: [3]}, (1, 2): {9: [0], 3: [1]}},
        ),
    ],
)
def test_branchings_are_where_tokens_differ_after_equal_ones(sequences: Any, branchings: Any) -> None:
    assert find_branchings(sequences) == branchings


def test_the_distribution_of_a_number_is_the_product_of_its_digits(
    build: Callable[..., Any],
    cohort: dict[str, Conversation],
    collate: Collator,
    scores: Callable[..., list[Prediction]],
) -> None:
    model, three = build().eval(), cohort["three"]  # its label is 63.5
    for layer in model.model.language_model.layers:  # new weights hardly attend to positions
        layer.self_attn.q_proj.weight.data *= 30
        layer.self_attn.k_proj.weight.data *= 30
    grid = {float(number): f"{number}." for number in (8, 9, 40, 41, 49, 63, 64, 120)}
    [scored] = scores(model, [three], {three.target: grid})
    texts = list(grid.values())
    batch = collate([collate.renderer.render(three, text) for text in texts], MaskPolicy(supervise="all"))
    with torch.no_grad():
        logits = model(batch.input_ids, batch.attention_mask, batch.pixel_values).logits.double()
    start = len(collate.renderer.prompt(three).input_ids)
    log_probability = [0.0] * len(texts)
    for i, text in enumerate(texts):
        for k, letter in enumerate(text):
            following = sorted({other[k] for other in texts if other[:k] == text[:k]})
            ids = collate.renderer.tokenizer.convert_tokens_to_ids(following)
            at = logits[i, start - 1 + k, ids].log_softmax(0)
            log_probability[i] += float(at[following.index(letter)])
    assert scored.numbers == tuple(grid)
    assert scored.number_probabilities == pytest.approx(torch.tensor(log_probability).exp().tolist(), abs=1e-5)
    assert sum(scored.number_probabilities) == pytest.approx(1)
    assert scored.probabilities == {}
    cumulative = dict(zip(grid, torch.tensor(scored.number_probabilities).cumsum(0).tolist(), strict=True))
    assert scored.answer == next(number for number, share in cumulative.items() if share >= 0.5)
    assert scored.number_interval == tuple(
        next(number for number, share in cumulative.items() if share >= least) for least in (0.05, 0.95)
    )
    assert scored.number_nll == pytest.approx(-log_probability[5], abs=1e-5), "63 is nearest to 63.5"


def test_a_conversation_is_scored_alike_in_any_batch(
    build: Callable[..., Any], cohort: dict[str, Conversation], scores: Callable[..., list[Prediction]]
) -> None:
    model, candidates = build().eval(), {"T2": SEX["T2"], cohort["three"].target: {60.0: "60", 70.0: "70"}}
    conversations = [cohort["three"], cohort["none"], cohort["two"]]
    together = scores(model, conversations, candidates)
    for conversation, in_batch in zip(conversations, together, strict=True):
        [alone] = scores(model, [conversation], candidates)
        assert alone.answer_nll == pytest.approx(in_batch.answer_nll, rel=1e-5)
        assert alone.probabilities == pytest.approx(in_batch.probabilities, abs=1e-6)
        assert alone.number_probabilities == pytest.approx(in_batch.number_probabilities, abs=1e-6)


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


def test_a_single_option_has_the_probability_one(
    build: Callable[..., Any], cohort: dict[str, Conversation], scores: Callable[..., list[Prediction]]
) -> None:
    [scored] = scores(build().eval(), [cohort["two"]], {"T2": {"female": "female."}}, truth=False)
    assert scored.probabilities == {"female": 1.0}


@pytest.mark.parametrize(
    ("grid", "labels", "expected"),
    [
        ((20, 30, 7), (20, 30), {20: "20", 27: "27"}),
        ((0, 1, 0.25), (0, 1), {0: "0.00", 0.25: "0.25", 0.5: "0.50", 0.75: "0.75", 1: "1.00"}),
        (None, (-1, 1), {-1: "-1", 0: "0", 1: "1"}),
        (None, (0.5, 0.7), {0.5: "0.5", 0.6: "0.6", 0.7: "0.7"}),
    ],
)
def test_the_numbers_of_a_grid_differ_in_their_texts(grid: Any, labels: Any, expected: dict[float, str]) -> None:
    conversations = [labelled(str(label), label, "x") for label in labels]
    assert find_candidates(conversations, {"x": grid} if grid else {})["x"] == expected


def test_a_grid_that_cannot_be_used_is_an_error() -> None:
    for grid in ([80, 20, 1], [20, 80, 0], [20, 80, -1], [0, 1e6, 1]):
        with pytest.raises(UserError, match=r"age: .* is not lowest, highest and step of 2 to 1000 numbers"):
            load_settings(overrides={"evaluate.number_grids": {"age": grid}})
    with pytest.raises(UserError, match=r"number_grids: agee: data.train has no numbers of it; .* of age"):
        find_candidates([labelled("6", 6, "age"), labelled("7", 7, "age")], {"agee": (0, 9, 1)})
