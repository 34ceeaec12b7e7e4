"""The label or number that is extracted from a generated text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbrella.evaluation.predictions import extract_answer

few = settings(max_examples=40, deadline=None, derandomize=True)

SEX = {"female": "female.", "male": "male."}
STAGE = {"mild": "mild", "very mild": "very mild", "none": "no dementia"}
YES = {"0": "No.", "1": "Yes."}
CODED = {"0": "cognitively normal", "1": "Alzheimer's disease"}
CDR = {"0": "0", "0.5": "0.5", "1": "1"}
AMYLOID = {"amyloid+": "amyloid+", "amyloid-": "amyloid-"}


@pytest.mark.parametrize(
    ("candidates", "texts"),
    [
        (SEX, {"**MALE**": "male", "The subject is a\nmale, 43 years old": "male", "male. Yes, male": "male"}),
        (SEX, {"females": None, "malevolent": None, "male or female": None, "I cannot tell": None, "": None}),
        (STAGE, {"very  Mild dementia": "very mild", "mild, very": "mild", "very mild, or mild": None}),
        (YES, {"yes": "1", "Yes, 1.": "1", "10": None, "Yes. No.": None}),
        (CODED, {"alzheimers disease": "1", "Alzheimer\u2019s  Disease": "1"}),
        (CDR, {"CDR of 0.5.": "0.5", "1.5": None, "-1": None}),
        (AMYLOID, {"amyloid-": "amyloid-", "it is amyloid-": None}),
        ({}, {"anything": None}),
    ],
)
def test_a_class_is_found_by_whole_words_if_it_is_the_only_one(candidates: dict, texts: dict[str, str | None]) -> None:
    assert {text: extract_answer(text, candidates, number=False) for text in texts} == texts


@pytest.mark.parametrize(
    ("candidates", "texts"),
    [
        (SEX, {"not male": None, "This is not a scan of a male.": None, "It isn\u2019t male": None, "non-male": None}),
        (SEX, {"male, which is not easy to say": "male", "No, this is a male subject.": "male"}),
        (STAGE, {"There is no dementia.": "none"}),
        (YES, {"No, the subject does not have it.": "0"}),
        ({"demented": "demented", "not demented": "not demented"}, {"not demented": "not demented"}),
        ({"demented": "demented", "nondemented": "nondemented"}, {"not nondemented": None}),
    ],
)
def test_a_class_that_is_negated_in_its_clause_is_no_answer(candidates: dict, texts: dict[str, str | None]) -> None:
    assert {text: extract_answer(text, candidates, number=False) for text in texts} == texts


@pytest.mark.parametrize(
    "texts",
    [
        {"about 43 years": 43.0, "43.": 43.0, "43years": 43.0, "(43)": 43.0, "43%": 43.0, "43 years, so 43.0": 43.0},
        {"-1.5 kg/m2": -1.5, "\u22121.5 kg/m\u00b2": -1.5, "24.5 kg/m^2": 24.5, "3 m^-2": 3.0},
        {".5": 0.5, "1e3": 1000.0, "1,234.5": 1234.5, "1,234,567": 1234567.0},
        {"The T1 scan of sub-0007 shows 43 years": 43.0, "On the 3D scan, the 2nd one: 43": 43.0},
        {"forty": None, "": None, "43-45": None, "43\u201345": None, "43 to 45": None, "43 years and 6 months": None},
        {"1/2": None, "43,5": None, "1,2345": None, "12.03.2020": None, "sub-0007": None, "T1": None, "1e999": None},
    ],
)
def test_a_number_is_found_if_it_is_the_only_one(texts: dict[str, float | None]) -> None:
    assert {text: extract_answer(text, SEX, number=True) for text in texts} == texts


@few
@given(st.floats(-1e6, 1e6).map(lambda x: round(x, 3)), st.sampled_from(["", " years", "years.", " kg/m2", ", or so"]))
def test_every_number_is_extracted_exactly(number: float, unit: str) -> None:
    assert extract_answer(f"I would say {number:,}{unit}", {}, number=True) == number
    assert extract_answer(f"I would say {number:.3f}{unit}", {}, number=True) == number


@few
@given(st.text(), st.sampled_from([SEX, STAGE, YES, CDR]))
def test_any_text_gives_a_known_label_or_none(text: str, candidates: dict[str, str]) -> None:
    assert extract_answer(text, candidates, number=False) in (*candidates, None)
    assert isinstance(extract_answer(text, candidates, number=True), float | None)
