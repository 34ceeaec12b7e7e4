"""Samples of all formats become the same ``Conversation``, or errors that name the field and the remedy."""

import copy
from typing import Any

import pytest

from tests.unit.samples import changed, sample
from umbrella.base import format_name, format_value
from umbrella.conversations.formats import FORMATS, SampleError, detect_format
from umbrella.conversations.schema import Conversation, ImageItem, TextItem, bids_subject
from umbrella.conversations.validation import parse_sample

V2 = sample(path="a_T1w.nii")
V1 = {
    "id": "t/sex",
    "conversations": [
        {
            "role": "user",
            "content": [{"type": "image_sMRI", "image_path": "a_T1w.nii"}, {"type": "text", "text": "Sex?"}],
        },
        {"role": "assistant", "content": "male."},
    ],
    "metadata": {"subject_sex": "male"},
}
LLAVA = {
    "id": "t/sex",
    "image": "a_T1w.nii",
    "conversations": [{"from": "human", "value": "<image>\nSex?"}, {"from": "gpt", "value": "male."}],
}
CHAT = {
    "id": "t/sex",
    "messages": [
        {"role": "user", "content": [{"type": "image", "path": "a_T1w.nii"}, {"type": "text", "text": "Sex?"}]},
        {"role": "assistant", "content": "male."},
    ],
}
SAMPLES = dict(zip(FORMATS, (V2, V1, LLAVA, CHAT), strict=True))


def parse(raw: Any, format: str = "auto", **options: Any) -> Conversation:
    options = {"modalities": None, "allow_unanswered": False, "allow_blank_answers": False} | options
    return parse_sample(raw, lambda path: (path, "" if path else "is empty"), format=format, **options)


def problems(raw: Any, **options: Any) -> list[str]:
    with pytest.raises(SampleError) as caught:
        parse(raw, **options)
    return [f"{field}: {message}" for field, message in caught.value.problems]


def turns(conversation: Conversation) -> list[tuple[str, list[str]]]:
    """Role and items; an image as <modality path>."""
    return [
        (t.role, [f"<{i.modality} {i.image_path}>" if isinstance(i, ImageItem) else i.text for i in t.content])
        for t in conversation.conversations
    ]


def llava(text: str, *files: Any, **others: Any) -> dict[str, Any]:
    return (
        LLAVA
        | {"image": list(files), "conversations": [{"from": "human", "value": text}, *LLAVA["conversations"][1:]]}
        | others
    )


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_detected_and_converted_to_the_same_conversation(format: str) -> None:
    raw = SAMPLES[format] | {"site": "A"}
    key = "messages" if format == "chat" else "conversations"
    role, content = ("from", "value") if format == "llava" else ("role", "content")
    raw[key] = [*raw[key], *({role: name, content: "x", "mood": 1} for name in ("human", "gpt", "system"))]
    before = copy.deepcopy(raw)
    assert detect_format(raw) == format
    conversation = parse(raw)
    assert turns(conversation) == [
        ("user", ["<sMRI a_T1w.nii>", "Sex?"]),
        ("assistant", ["male."]),
        *((name, ["x"]) for name in ("user", "assistant", "system")),
    ]
    assert (conversation.task_id, conversation.task_type) == ("t/sex", "T1")
    assert conversation.model_extra == {"site": "A"}
    assert conversation.conversations[2].model_extra == {"mood": 1}
    assert raw == before


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"id": "t", "conversations": []}, "v1"),
        ({"id": "t", "image": "a.nii", "conversations": []}, "llava"),
        ({"id": "t", "images": [], "conversations": [{"role": "user"}]}, "v2"),
        ({"task_id": "t", "conversations": [{"role": "user", "content": [{"type": "image_sMRI"}]}]}, "v1"),
        ({"task_id": "t", "conversations": 3, "messages": []}, "v2"),
        ({"messages": None}, "chat"),
    ],
)
def test_the_format_of_incomplete_samples_is_detected(raw: dict, expected: str) -> None:
    assert detect_format(raw) == expected


def test_a_given_format_precedes_the_detected_one() -> None:
    raw = V2 | {"messages": CHAT["messages"], "images": None}
    assert turns(parse(raw, format="chat")) == turns(parse(CHAT))


def test_v1_labels_get_their_v2_names_too() -> None:
    old = {"subject_sex": "male", "reference_sex": "female", "comparison_type": "different_sex", "n": 1}
    new = {"subject_label": "male", "reference_label": "female", "comparison_type": "different", "target": "sex"}
    assert parse(V1 | {"metadata": old}).metadata == old | new
    kept = {"subject_sex": "male", "subject_label": 44, "task": "age"}
    assert parse(V1 | {"metadata": kept}).metadata == kept
    assert parse(changed(V2, {"metadata": {"subject_sex": "male"}})).label is None


@pytest.mark.parametrize(
    ("images", "rounds", "extra", "expected"),
    [
        (1, 2, {}, "T1"),
        (2, 1, {}, "T2"),
        (2, 2, {}, "T3"),
        (2, 1, {"subject_ids": ["a", "b"]}, "T3"),
        (2, 1, {"subject_ids": ["a", "a"]}, "T2"),
        (2, 1, {"metadata": {"subject_id": "a", "reference_id": "b"}}, "T3"),
        (2, 2, {"task_type": "T2"}, "T2"),
    ],
)
def test_a_missing_task_type_follows_from_images_turns_and_subjects(
    images: int, rounds: int, extra: dict, expected: str
) -> None:
    image = {"type": "image_sMRI", "image_path": "a.nii"}
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}] * rounds
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [image] * images}, *talk[1:]]
    assert parse({"id": 7, "conversations": talk} | extra).task_type == expected


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("<image>\nSex?", ["<sMRI 1_T1w.nii>", "Sex?"]),
        ("Sex?\n<image>", ["Sex?", "<sMRI 1_T1w.nii>"]),
        ("One:\r\n<image>\n\nor <image>?", ["One:", "<sMRI 1_T1w.nii>", "or ", "<fMRI 2_bold.nii.gz>", "?"]),
        ("<image><image>\n a\n\nb \n", ["<sMRI 1_T1w.nii>", "<fMRI 2_bold.nii.gz>", " a\n\nb \n"]),
    ],
)
def test_placeholders_split_a_text_and_the_rest_of_it_is_unchanged(text: str, items: list[str]) -> None:
    files = ["1_T1w.nii", "2_bold.nii.gz"][: text.count("<image>")]
    messages = [{"role": "user", "content": text}, CHAT["messages"][1]]
    for raw in (llava(text, *files), {"id": "t", "messages": messages, "images": files}):
        assert turns(parse(raw))[0][1] == items


@pytest.mark.parametrize(
    "image",
    [
        {"type": "image", "image": "a_T1w.nii"},
        {"type": "image", "image_path": "a_T1w.nii"},
        {"type": "image_url", "image_url": {"url": "a_T1w.nii"}},
        {"type": "image_url", "image_url": "a_T1w.nii"},
        {"type": "image", "url": "file:a_T1w.nii", "path": "a_T1w.nii"},
    ],
)
def test_an_item_names_its_file_by_any_usual_key(image: dict) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Sex?"}, image]}, CHAT["messages"][1]]
    assert turns(parse(CHAT | {"messages": messages}))[0] == ("user", ["Sex?", "<sMRI a_T1w.nii>"])


def test_a_list_of_images_completes_the_items() -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}, CHAT["messages"][1]]
    files = [{"path": "1.nii", "modality": "PET"}, {"url": "file:///my%20scans/2_FA.nii"}]
    [(_, items), _] = turns(parse({"id": "t", "messages": messages, "images": files}))
    assert items == ["<PET 1.nii>", "<dMRI /my scans/2_FA.nii>"]
    assert turns(parse(changed(V2, {"images": ...}))) == turns(parse(V2))


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        *((f"/data/sub-1_space-MNI_{suffix}.nii.gz", "sMRI") for suffix in ("T1w", "T2w", "FLAIR")),
        *((f"sub-1_{suffix}.nii", "dMRI") for suffix in ("FA", "MD", "dwi", "ADC")),
        ("sub-1_task-rest_bold.nii.gz", "fMRI"),
    ],
)
def test_the_modality_follows_from_the_suffix_of_the_file_name_unless_it_is_given(name: str, modality: str) -> None:
    assert parse(LLAVA | {"image": name}).volumes[0].modality == modality
    assert parse(LLAVA | {"image": name, "modality": "PET"}).volumes[0].modality == "PET"
    assert parse(LLAVA | {"image": name, "modalities": ["PET"], "modality": "CT"}).volumes[0].modality == "PET"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mask", [[1, 0], [True, False], [1.0, 0.0]])
def test_loss_mask_gives_the_flags_of_the_turns_and_system_the_first_turn(format: str, mask: list) -> None:
    plain = turns(parse(SAMPLES[format]))
    conversation = parse(SAMPLES[format] | {"loss_mask": mask, "system": "Be brief."})
    assert turns(conversation) == [("system", ["Be brief."]), *plain]
    assert [turn.in_loss for turn in conversation.conversations] == [True, True, False]
    assert turns(parse(SAMPLES[format] | {"loss_mask": None, "system": " "})) == plain


@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0}, {"train": 0.0}, {"loss": True, "weight": 0}])
def test_any_false_flag_excludes_a_turn_from_the_loss(flag: dict) -> None:
    raw = CHAT | {"messages": [CHAT["messages"][0], CHAT["messages"][1] | flag]}
    for options in ({}, {"loss_mask": [1, 1]}):
        assert [turn.in_loss for turn in parse(raw | options).conversations] == [True, False]


def test_a_system_text_that_is_given_twice_is_one_turn() -> None:
    raw = LLAVA | {"conversations": [{"from": "system", "value": "Be brief.\n"}, *LLAVA["conversations"]]}
    assert [role for role, _ in turns(parse(raw | {"system": "Be brief."}))] == ["system", "user", "assistant"]
    assert problems(raw | {"system": "Be long."}) == [
        "system: differs from the text of the system turn; keep one of them"
    ]


ANSWER, IMAGE, TEXT = "conversations.1.content", "conversations.0.content.0", "conversations.0.content.1"
LABEL = "metadata.subject_label: must be a text or a finite number, not"
INVALID = {
    "task_id: is missing; give every sample a name of its own in `task_id` or `id`": {"task_id": ...},
    "task_id: must be a text, not 3": {"task_id": 3},
    "task_id: is empty; write a name": {"task_id": " "},
    "task_id: 'a\\nb' holds a line break or another control character; leave it out": {"task_id": "a\nb"},
    "metadata: must be an object {...}, not [1]": {"metadata": [1]},
    f"{LABEL} ['male']": {"metadata.subject_label": ["male"]},
    f"{LABEL} true": {"metadata.subject_label": True},
    f"{LABEL} inf": {"metadata.subject_label": float("inf")},
    f"{LABEL} 100000000000000000...0000000000000000000": {"metadata.subject_label": 10**400},
    "metadata.subject_label: is empty; write the label, or leave it out": {"metadata.subject_label": " "},
    "metadata.target: must be a text, not true": {"metadata.target": True},
    "metadata.subject_id: must be a text or a number, not ['b']": {"metadata.subject_id": ["b"]},
    "metadata.reference_id: is empty; write a name": {"metadata.reference_id": ""},
    "subject_ids.1: must be a text or a number, not null": {"subject_ids": ["b", None]},
    "subject_ids: must be a list, not 'b'": {"subject_ids": "b"},
    "conversations: must be a list, not {'a': {}}": {"conversations": {"a": {}}},
    "conversations: no assistant turn, so there is nothing to learn from or to score; add the answer": {
        "conversations": []
    },
    "conversations: no user turn, so nothing is asked; add the question": {"conversations.0.role": "system"},
    "conversations: ends with a user turn that nothing answers; add the answer, or leave the turn out": {
        "conversations": [*V2["conversations"], {"role": "user", "content": "Age?"}]
    },
    "conversations.1: must be an object {...}, not 'male.'": {"conversations.1": "male."},
    "conversations.1.role: is missing; add it": {"conversations.1.role": ...},
    "conversations.1.role: '{bot}' is not known; use system, user or assistant": {"conversations.1.role": "{bot}"},
    f"{ANSWER}: is missing; add it": {ANSWER: ...},
    f"{ANSWER}: must be a text or a list of items, not 3": {ANSWER: 3},
    f"{ANSWER}: is empty; write a text, or leave the turn out": {ANSWER: " \n"},
    f"{ANSWER}.0: must be an object {{...}}, not 'Hi'": {ANSWER: ["Hi"]},
    f'{TEXT}: has no `type`; add "type": "text" or "type": "image"': {f"{TEXT}.type": ...},
    f"{TEXT}: {{'type': 'video'}} is of no known `type`; use text or image": {TEXT: {"type": "video"}},
    f"{TEXT}.text: must be a text, not 3": {f"{TEXT}.text": 3},
    f"{IMAGE}.image_path: must be a text, not 3": {f"{IMAGE}.image_path": 3},
    "image_path: is empty": {f"{IMAGE}.image_path": ..., "images": ...},
    "modality: 'PET' is not one of sMRI, fMRI; correct it or add it to `modalities`": {
        f"{IMAGE}.modality": "PET",
        "images": ...,
    },
    "images: the number of entries is 0, that of images in the turns is 1; list each of those once, in their order": {
        "images": []
    },
    "images.0: must be a text, not 3": {"images.0.path": 3},
    "images.0: 'b.nii', but image 0 of the turns has 'a_T1w.nii'; they must be the same": {"images.0.path": "b.nii"},
    "images.0: 'dMRI', but image 0 of the turns has 'sMRI'; they must be the same": {"images.0.modality": "dMRI"},
    "conversations: the number of <image> in the texts is 2, that of images in the turns is 1; there must be one for"
    " each": {f"{TEXT}.text": "<image> <image>"},
    "conversations: the number of <x> in the texts is 2, that of images in the turns is 1; there must be one for"
    " each": {f"{TEXT}.text": "<x> <x>", "images.0.token": "<x>"},
    "conversations.1.weight: must be true or false, or 1 or 0, not 0.5": {"conversations.1.weight": 0.5},
    "conversations.0.content.1.paraphrase: must be a text, not ['Which?']": {f"{TEXT}.paraphrase": ["Which?"]},
    "loss_mask: has 1 entries for 2 turns; write one for each turn": {"loss_mask": [1]},
    "loss_mask: must be a list of true or false, or 1 or 0, one for each turn, not '01'": {"loss_mask": "01"},
    "system: must be a text, not 3": {"system": 3},
}


@pytest.mark.parametrize("expected", INVALID)
def test_an_invalid_sample_gives_one_problem_with_field_and_remedy(expected: str) -> None:
    assert problems(changed(V2, INVALID[expected]), modalities=["sMRI", "fMRI"]) == [expected]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([1], "sample: must be an object {...}, not [1]"),
        (
            {"question": 1, "answer": 2},
            "sample: has the keys question, answer, which is no known format; accepted are v2 and v1 (`conversations`"
            " with `role`), llava (`conversations` with `from`), chat (`messages`)",
        ),
        (
            LLAVA | {"conversations": [{"from": "human"}, LLAVA["conversations"][1]]},
            "conversations.0.value: is missing",
        ),
        (llava("<image>", "b.nii"), "modality: cannot be inferred from the file name 'b.nii'; add `modality` to the"),
        (
            llava("<image>", "bold.d/a_T1w_brain.nii"),
            "modality: cannot be inferred from the file name 'a_T1w_brain.nii'",
        ),
        (llava("<image>", "b.nii", modality=3), "modality: must be a text, not 3"),
        (
            llava("<image>", "b.nii", modalities=["PET", "CT"]),
            "modalities: ['PET', 'CT'] is not a list of one for each image; the number of images is 1",
        ),
        (llava("<image>", "1.nii", "2.nii"), "image: the number of entries is 2, that of `<image>` placeholders is 1;"),
        (llava("<image>", 3), "image.0: must be a text, not 3"),
        (llava("<image>", {}), "image_path: is empty"),
        ({"id": "t", "messages": None}, "messages: must be a list, not null"),
        (CHAT | {"messages": CHAT["messages"][:1]}, "messages: no assistant turn"),
        (CHAT | {"system": "Be brief.", "messages": [*CHAT["messages"], {"role": "bot"}]}, "messages.2.role: 'bot'"),
    ],
)
def test_problems_name_the_keys_of_the_format(raw: Any, expected: str) -> None:
    assert problems(raw)[0].startswith(expected)


def test_all_problems_of_a_sample_are_listed_first_those_of_types() -> None:
    both = {"task_id": 3, "metadata": 3, "conversations.1.role": "narrator", "images": []}
    assert [line.split(": ")[0] for line in problems(changed(V2, both))] == [
        "task_id",
        "conversations.1.role",
        "metadata",
    ]
    values = {"images": [], "metadata.subject_id": "", ANSWER: ""}
    assert [line.split(": ")[0] for line in problems(changed(V2, values))] == ["images", "metadata.subject_id", ANSWER]


@pytest.mark.parametrize("content", ["", " \n", [], None, [{"type": "text", "text": ""}]])
@pytest.mark.parametrize("format", ["v2", "chat", "llava"])
def test_a_blank_last_answer_is_allowed_where_it_is_asked_for(content: Any, format: str) -> None:
    place = {"v2": ANSWER, "chat": "messages.1.content", "llava": "conversations.1.value"}[format]
    raw = changed(SAMPLES[format], {place: content, "metadata": {"subject_label": "male"}})
    blank = f"{place}: is empty; write a text, or leave the turn out"
    conversation = parse(raw, allow_blank_answers=True)
    assert not conversation.is_answered
    assert conversation.with_answer("male.").answer == "male."
    assert problems(raw) == [blank]
    assert problems(raw | {"metadata": {}}, allow_blank_answers=True) == [blank]
    assert not parse(raw | {"metadata": {}}, allow_unanswered=True).is_answered


def test_an_unanswered_sample_gets_a_blank_answer_where_it_is_asked_for() -> None:
    for raw in (changed(V2, {"conversations.1": ...}), changed(CHAT, {"messages.1": ...})):
        assert turns(parse(raw, allow_unanswered=True))[1:] == [("assistant", [""])]
        assert "no assistant turn" in problems(raw, allow_blank_answers=True)[0]


def test_strings_become_texts_and_extra_keys_and_numbers_are_kept() -> None:
    metadata = {"subject_id": "s", "subject_label": 63.5, "target": "age", "site": {"name": "A"}}
    conversation = parse(changed(V2, {"metadata": metadata, "subject_ids": ["s"], ANSWER: "63.5"}))
    assert conversation.conversations[1].content == (TextItem(type="text", text="63.5"),)
    assert conversation.model_dump()["subject_ids"] == ["s"]
    assert (conversation.label, conversation.target, conversation.subject_id) == (63.5, "age", "s")
    assert conversation.metadata == metadata


@pytest.mark.parametrize(
    ("stated", "subject", "subjects"),
    [
        ({"metadata": {"subject_id": 7}}, "7", {"7"}),
        ({"metadata": {"subject_id": 7.0}}, "7", {"7"}),
        ({"metadata": {"subject_id": "7 "}}, "7", {"7"}),
        ({"metadata": {"patient_id": 7.5}}, "7.5", {"7.5"}),
        ({"metadata": {}, "subject_id": " 7"}, "7", {"7"}),
        ({"metadata": {}, "patient_id": 7}, "7", {"7"}),
        ({"metadata": {"reference_id": 8}, "subject_ids": ["8", 7.0]}, "7", {"7", "8"}),
        ({"metadata": {}, "subject_ids": ["8", 7.0]}, "t/sex", {"t/sex", "7", "8"}),
        ({"metadata": {"subject_id": "a", "reference_id": "b"}, "subject_ids": ["c", 4]}, "a", {"a", "b", "c", "4"}),
        ({"metadata": {"subject_id": None, "reference_id": None}, "subject_ids": None}, "t/sex", {"t/sex"}),
    ],
)
def test_the_subject_is_the_same_however_it_is_stated(stated: dict, subject: str, subjects: set[str]) -> None:
    conversation = parse(V2 | stated)
    assert (conversation.subject_id, conversation.subjects) == (subject, subjects)


@pytest.mark.parametrize(
    ("path", "subject"),
    [
        ("sub-01_ses-2_T1w.nii.gz", "sub-01"),
        ("/a/sub-01/ses-2/T1w.nii", "sub-01"),
        ("C:\\a\\sub-01\\T1w.nii", "sub-01"),
        ("/sub-study/sub-01/sub-02_T1w.nii", "sub-02"),
        ("/a/mysub-01_T1w.nii", None),
        ("/a/subject-01/T1w.nii", None),
    ],
)
def test_the_last_bids_entity_of_a_path_names_the_subject(path: str, subject: str | None) -> None:
    assert bids_subject(path) == subject


def test_the_last_answer_need_not_be_the_last_turn() -> None:
    turns = [*V2["conversations"], {"role": "user", "content": "Thanks."}]
    assert Conversation.model_validate(V2 | {"conversations": turns}).answer == "male."


def test_values_in_messages_are_json_and_short() -> None:
    assert format_value([None, True, {"a": False}]) == "[null, true, {'a': false}]"
    assert (format_name("a b"), format_name("a\nb"), format_name("")) == ("a b", "'a\\nb'", "''")
    assert len(format_value("x" * 5000)) == len(format_name("x" * 5000)) == 300
    assert len(format_value(["x" * 5000, 10**400])) <= 300
