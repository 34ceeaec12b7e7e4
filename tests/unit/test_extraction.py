"""Answers found in a model's own words."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbrella.evaluation.extraction import extract_answer

few = settings(max_examples=60, deadline=None, derandomize=True)

SEX = {"female": "female.", "male": "male."}
STAGE = {"mild": "mild", "very mild": "very mild", "none": "no dementia"}
YES = {"0": "No.", "1": "Yes."}
CODED = {"0": "cognitively normal", "1": "Alzheimer's disease"}
CDR = {"0": "0", "0.5": "0.5", "1": "1"}


@pytest.mark.parametrize(
    ("text", "candidates", "label"),
    [
        ("female.", SEX, "female"),
        ("This subject is MALE!", SEX, "male"),
        ("**Male**", SEX, "male"),
        ("The subject is a\nmale, 43 years old", SEX, "male"),
        ("male. Yes, male", SEX, "male"),
        ("females", SEX, None),  # another word
        ("malevolent", SEX, None),
        ("male or female", SEX, None),
        ("I cannot tell", SEX, None),
        ("", SEX, None),
        ("...", SEX, None),
        ("very mild", STAGE, "very mild"),
        ("very  Mild dementia", STAGE, "very mild"),
        ("mild, very", STAGE, "mild"),
        ("very mild, or mild", STAGE, None),
        ("There is no dementia.", STAGE, "none"),
        ("yes", YES, "1"),
        ("1", YES, "1"),
        ("Yes, 1.", YES, "1"),
        ("10", YES, None),
        ("Yes. No.", YES, None),
        ("alzheimers disease", CODED, "1"),
        ("Alzheimer\u2019s  Disease", CODED, "1"),
        ("0.5", CDR, "0.5"),
        ("CDR of 0.5.", CDR, "0.5"),
        ("1.5", CDR, None),
        ("-1", CDR, None),
        ("amyloid-", {"amyloid+": "amyloid+", "amyloid-": "amyloid-"}, "amyloid-"),
        ("it is amyloid-", {"amyloid+": "amyloid+", "amyloid-": "amyloid-"}, None),
        ("anything", {}, None),
    ],
)
def test_a_class_is_found_by_whole_words_and_only_where_no_other_is(
    text: str, candidates: dict[str, str], label: str | None
) -> None:
    assert extract_answer(text, candidates, number=False) == label


@pytest.mark.parametrize(
    ("text", "candidates", "label"),
    [
        ("not male", SEX, None),
        ("This is not a scan of a male subject.", SEX, None),
        ("It isn't male", SEX, None),
        ("It isn\u2019t male", SEX, None),
        ("non-male", SEX, None),
        ("male, which is not easy to say", SEX, "male"),
        ("No, this is a male subject.", SEX, "male"),
        ("No, the subject does not have it.", YES, "0"),
        ("not demented", {"demented": "demented", "not demented": "not demented"}, "not demented"),
        ("not nondemented", {"demented": "demented", "nondemented": "nondemented"}, None),
    ],
)
def test_what_is_denied_in_the_same_part_of_a_sentence_is_no_answer(
    text: str, candidates: dict[str, str], label: str | None
) -> None:
    assert extract_answer(text, candidates, number=False) == label


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("about 43 years", 43.0),
        ("43.", 43.0),
        ("43years", 43.0),
        ("(43)", 43.0),
        ("43%", 43.0),
        ("-1.5 kg/m2", -1.5),
        ("\u22121.5 kg/m\u00b2", -1.5),
        ("24.5 kg/m^2", 24.5),
        ("3 m^-2", 3.0),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("1,234.5", 1234.5),
        ("1,234,567", 1234567.0),
        ("43 years, so 43.0", 43.0),
        ("The T1 scan of sub-0007 shows 43 years", 43.0),
        ("On the 3D scan, the 2nd one: 43", 43.0),
        ("forty", None),
        ("", None),
        ("43-45", None),
        ("43\u201345", None),
        ("43 to 45", None),
        ("43 years and 6 months", None),
        ("1/2", None),
        ("43,5", None),
        ("1,2345", None),
        ("12.03.2020", None),
        ("sub-0007", None),
        ("T1", None),
        ("1e999", None),
    ],
)
def test_a_number_is_found_where_it_is_the_only_one(text: str, number: float | None) -> None:
    assert extract_answer(text, SEX, number=True) == number


@few
@given(st.floats(-1e6, 1e6).map(lambda x: round(x, 3)), st.sampled_from(["", " years", "years.", " kg/m2", ", or so"]))
def test_every_number_is_read_back(number: float, unit: str) -> None:
    assert extract_answer(f"I would say {number:,}{unit}", {}, number=True) == number
    assert extract_answer(f"I would say {number:.3f}{unit}", {}, number=True) == number


@few
@given(st.text(), st.sampled_from([SEX, STAGE, YES, CDR]))
def test_any_text_gives_a_known_label_or_nothing(text: str, candidates: dict[str, str]) -> None:
    assert extract_answer(text, candidates, number=False) in (*candidates, None)
    assert isinstance(extract_answer(text, candidates, number=True), float | None)


@few
@given(
    st.lists(st.sampled_from(["male", "female", "scan", "the", "of"]), max_size=6), st.sampled_from([" ", ", ", "; "])
)
def test_the_only_label_among_other_words_is_found(words: list[str], between: str) -> None:
    labels = set(words) & set(SEX)
    assert extract_answer(between.join(words).upper(), SEX, number=False) == (
        labels.pop() if len(labels) == 1 else None
    )
