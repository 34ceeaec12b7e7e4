"""Samples of every accepted format become the same Conversation."""

import copy
from typing import Any

import pytest

from umbrella.conversations.formats import FORMATS, FormatError, convert, detect_format, original_field
from umbrella.conversations.schema import Conversation, ImageItem

V2 = {
    "task_id": "t",
    "task_type": "T1",
    "images": [{"path": "a_T1w.nii", "token": "<image>", "modality": "sMRI"}],
    "conversations": [
        {
            "role": "user",
            "content": [
                {"type": "image", "modality": "sMRI", "image_path": "a_T1w.nii"},
                {"type": "text", "text": "Sex?"},
            ],
        },
        {"role": "assistant", "content": "male."},
    ],
}
V1 = {
    "id": "t",
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
    "id": "t",
    "image": "a_T1w.nii",
    "conversations": [{"from": "human", "value": "<image>\nSex?"}, {"from": "gpt", "value": "male."}],
}
CHAT = {
    "id": "t",
    "messages": [
        {"role": "user", "content": [{"type": "image", "path": "a_T1w.nii"}, {"type": "text", "text": "Sex?"}]},
        {"role": "assistant", "content": "male."},
    ],
}
SAMPLES = dict(zip(FORMATS, (V2, V1, LLAVA, CHAT), strict=True))


def to_v2(raw: Any, format: str = "auto") -> dict[str, Any]:
    sample, problems = convert(raw, detect_format(raw) if format == "auto" else format)
    if problems:
        raise FormatError(problems)
    return sample


def read(raw: dict, **options: Any) -> Conversation:
    return Conversation.model_validate(to_v2(raw, **options))


def turns(conversation: Conversation) -> list[tuple[str, list[str]]]:
    """Role and items; an image as <modality path>."""
    return [
        (t.role, [f"<{i.modality} {i.image_path}>" if isinstance(i, ImageItem) else i.text for i in t.content])
        for t in conversation.conversations
    ]


def refusals(raw: Any, **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(FormatError) as caught:
        to_v2(raw, **options)
    return caught.value.problems


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_recognised_and_means_the_same(format: str) -> None:
    raw = SAMPLES[format]
    before = copy.deepcopy(raw)
    assert detect_format(raw) == format
    conversation = read(raw)
    assert turns(conversation) == [("user", ["<sMRI a_T1w.nii>", "Sex?"]), ("assistant", ["male."])]
    assert [(image.path, image.modality) for image in conversation.images] == [("a_T1w.nii", "sMRI")]
    assert (conversation.task_id, conversation.task_type) == ("t", "T1")
    assert raw == before


@pytest.mark.parametrize("format", FORMATS)
def test_unknown_keys_survive_and_other_names_of_roles_are_understood(format: str) -> None:
    raw = SAMPLES[format] | {"site": "A"}
    key = "messages" if format == "chat" else "conversations"
    names = ("from", "value") if format == "llava" else ("role", "content")
    extra = [{names[0]: role, names[1]: f"I am {role}", "mood": 1} for role in ("human", "gpt", "system")]
    conversation = read(raw | {key: [*raw[key], *extra]})
    assert [role for role, _ in turns(conversation)[2:]] == ["user", "assistant", "system"]
    assert conversation.model_dump()["site"] == "A"
    assert conversation.model_dump()["conversations"][2]["mood"] == 1


def test_v2_stays_as_it_is() -> None:
    assert to_v2(V2) == V2


def test_v1_labels_get_their_new_names_beside_the_old_ones() -> None:
    old = {"subject_sex": "male", "reference_sex": "female", "comparison_type": "different_sex", "n": 1}
    conversation = read(V1 | {"metadata": old})
    assert conversation.metadata == old | {
        "subject_label": "male",
        "reference_label": "female",
        "comparison_type": "different",
        "target": "sex",
    }
    kept = {"subject_sex": "male", "subject_label": 44, "task": "age"}
    assert read(V1 | {"metadata": kept}).metadata == kept


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
def test_the_task_type_follows_from_images_turns_and_subjects_when_missing(
    images: int, rounds: int, extra: dict, expected: str
) -> None:
    image = {"type": "image_sMRI", "image_path": "a.nii"}
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}] * rounds
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [image] * images}, *talk[1:]]
    assert read({"id": "t", "conversations": talk} | extra).task_type == expected


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("<image>\nSex?", ["<sMRI 1_T1w.nii>", "Sex?"]),
        ("Sex?\n<image>", ["Sex?", "<sMRI 1_T1w.nii>"]),
        ("One:\r\n<image>\n\nor <image>?", ["One:", "<sMRI 1_T1w.nii>", "or ", "<fMRI 2_bold.nii.gz>", "?"]),
        ("<image><image>\n a\n\nb \n", ["<sMRI 1_T1w.nii>", "<fMRI 2_bold.nii.gz>", " a\n\nb \n"]),
    ],
)
def test_llava_text_is_cut_at_placeholders_and_otherwise_untouched(text: str, items: list[str]) -> None:
    files = ["1_T1w.nii", "2_bold.nii.gz"][: text.count("<image>")]
    raw = {"id": 7, "image": files, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]}
    conversation = read(raw)
    assert turns(conversation)[0][1] == items
    assert conversation.task_id == "7"


@pytest.mark.parametrize(
    ("files", "text", "problem"),
    [
        ("a_T1w.nii", "Sex?", "the number of files is 1, that of `<image>` placeholders is 0"),
        (["a_T1w.nii"], "<image> and <image>", "the number of files is 1, that of `<image>` placeholders is 2"),
        ([], "<image>", "the number of files is 0, that of `<image>` placeholders is 1"),
    ],
)
def test_llava_placeholders_and_images_agree_in_number(files: Any, text: str, problem: str) -> None:
    raw = LLAVA | {"image": files, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]}
    assert refusals(raw) == [("image", f"{problem}; there must be one for each")]


def test_image_tokens_in_the_text_of_other_formats_agree_in_number_with_the_images() -> None:
    def with_text(raw: dict, key: str, text: str, **changes: Any) -> dict:
        return raw | {key: [{"role": "user", "content": text}, *raw[key]]} | changes

    scan = [{"path": "a_T1w.nii", "token": "<scan>", "modality": "sMRI"}]
    for format, key, token in (("v2", "conversations", "<image>"), ("v1", "conversations", "<image_sMRI>")):
        what = f"the number of {token} in the texts is 2, that of image items is 1; there must be one for each"
        assert refusals(with_text(SAMPLES[format], key, f"{token} and {token}")) == [(key, what)]
        assert turns(read(with_text(SAMPLES[format], key, f"{token}!")))[0] == ("user", [f"{token}!"])
    assert read(with_text(V2, "conversations", "<image> <image>", images=scan)).task_id == "t"
    assert len(refusals(with_text(V2, "conversations", "<scan> <scan>", images=scan))) == 1
    assert refusals(with_text(CHAT, "messages", "<image> <image>"))[0][0] == "messages"


@pytest.mark.parametrize(
    "image",
    [
        {"type": "image", "image": "a_T1w.nii"},
        {"type": "image", "image_path": "a_T1w.nii"},
        {"type": "image", "url": "a_T1w.nii"},
        {"type": "image", "image_url": {"url": "a_T1w.nii"}},
        {"type": "image_url", "image_url": {"url": "a_T1w.nii"}},
        {"type": "image_url", "image_url": "a_T1w.nii"},
        {"type": "image", "url": "file:a_T1w.nii", "path": "a_T1w.nii"},
    ],
)
def test_chat_items_name_their_file_in_every_usual_way(image: dict) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Sex?"}, image]}, CHAT["messages"][1]]
    assert turns(read(CHAT | {"messages": messages}))[0] == ("user", ["Sex?", "<sMRI a_T1w.nii>"])


@pytest.mark.parametrize("content", ["One <image> or <image>", [{"type": "image"}, {"type": "image"}]])
@pytest.mark.parametrize("files", [["1_T1w.nii", "2_FA.nii"], [{"path": "1_T1w.nii"}, {"url": "file:///x/2_FA.nii"}]])
def test_chat_images_may_be_listed_for_the_whole_sample(content: Any, files: list) -> None:
    messages = [{"role": "user", "content": content}, CHAT["messages"][1]]
    volumes = read({"id": "t", "messages": messages, "images": files}).volumes
    assert [v.image_path.split("/")[-1] for v in volumes] == ["1_T1w.nii", "2_FA.nii"]
    [(field, what)] = refusals({"id": "t", "messages": messages, "images": files[:1]})
    assert (field, what.split(";")[0]) == (
        "images",
        "the number of files is 1, that of image items and `<image>` placeholders is 2",
    )


def test_a_file_address_is_a_path() -> None:
    [volume] = read(LLAVA | {"image": "file:///my%20scans/a_T1w.nii"}).volumes
    assert volume.image_path == "/my scans/a_T1w.nii"


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        *((f"/data/sub-1_space-MNI_{suffix}.nii.gz", "sMRI") for suffix in ("T1w", "T2w", "FLAIR")),
        *((f"sub-1_{suffix}.nii", "dMRI") for suffix in ("FA", "MD", "dwi", "ADC")),
        ("sub-1_task-rest_bold.nii.gz", "fMRI"),
    ],
)
def test_the_modality_is_told_from_the_suffix_of_the_file_name(name: str, modality: str) -> None:
    assert read(LLAVA | {"image": name}).volumes[0].modality == modality


def test_a_stated_modality_wins_and_one_that_cannot_be_told_is_a_problem() -> None:
    assert read(LLAVA | {"modality": "PET"}).images[0].modality == "PET"
    assert read(LLAVA | {"modalities": ["PET"], "modality": "CT"}).images[0].modality == "PET"
    for raw in (LLAVA | {"image": "FA/a_T1w_brain.nii"}, LLAVA | {"image": "dir_bold.d/a_T1w_brain.nii"}):
        what = "cannot be inferred from the file name 'a_T1w_brain.nii'; add `modality` to the sample"
        assert refusals(raw) == [("modality", what)]
    what = "['PET', 'CT'] is not a list of one for each image; the number of images is 1"
    assert refusals(LLAVA | {"modalities": ["PET", "CT"]}) == [("modalities", what)]


def test_a_stated_format_wins_over_the_keys() -> None:
    raw = V2 | {"messages": CHAT["messages"], "images": []}
    assert detect_format(raw) == "v2"
    assert turns(read(raw, format="chat")) == turns(read(CHAT))
    with pytest.raises(FormatError, match="format: 'v3' is not known; use auto, v2, v1, llava, chat"):
        to_v2(V2, format="v3")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"id": "t", "conversations": []}, "v1"),
        ({"id": "t", "image": "a.nii", "conversations": []}, "llava"),
        ({"id": "t", "images": [], "conversations": [{"role": "user"}]}, "v2"),
        ({"task_id": "t", "conversations": [{"role": "user", "content": [{"type": "image_sMRI"}]}]}, "v1"),
        ({"task_id": "t", "conversations": [{"from": "human"}]}, "llava"),
        ({"task_id": "t", "conversations": 3}, "v2"),
        ({"messages": None}, "chat"),
        ({"task_id": "t"}, "v2"),
        ({"id": "t", "image": "a.nii"}, "v1"),
        ({"id": "t", "images": ["a.nii"]}, "chat"),
    ],
)
def test_unfinished_samples_are_recognised_too(raw: dict, expected: str) -> None:
    assert detect_format(raw) == expected


def test_a_sample_of_no_format_is_told_what_it_has_and_what_is_accepted() -> None:
    accepted = "v2 and v1 (`conversations` with `role`), llava (`conversations` with `from`), chat (`messages`)"
    assert refusals({"question": 1, "answer": 2}) == [
        ("sample", f"has the keys question, answer, which is no known format; accepted are {accepted}")
    ]
    for format in ("auto", *FORMATS):
        assert refusals([1], format=format) == [("sample", "must be an object {...}, not [1]")]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rubbish", [3, None, "x", [1], {"a": 1}, [{"role": {}, "content": [1, {"type": []}]}]])
def test_rubbish_is_left_for_the_type_to_refuse(format: str, rubbish: Any) -> None:
    for key in ("messages" if format == "chat" else "conversations", "metadata", "subject_ids"):
        assert convert(SAMPLES[format] | {key: rubbish}, format)[0]["task_id"] == "t"
    assert convert(SAMPLES[format] | {"image": rubbish, "modality": rubbish}, format)[0]["task_id"] == "t"


def test_fields_are_named_as_in_the_file() -> None:
    assert original_field("conversations.0.role", "chat") == "messages.0.role"
    assert original_field("conversations.0.role", "llava") == "conversations.0.from"
    assert original_field("conversations.0.content.1.text", "llava") == "conversations.0.value"
    assert original_field("conversations.0.content.1.text", "v1") == "conversations.0.content.1.text"


def loss_of(conversation: Conversation) -> list[bool]:
    return [turn.in_loss for turn in conversation.conversations]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mask", [[1, 0], [True, False], [1.0, 0.0]])
def test_the_loss_mask_of_a_sample_is_that_of_its_turns_and_its_system_text_the_first_turn(
    format: str, mask: list
) -> None:
    plain = turns(read(SAMPLES[format]))
    conversation = read(SAMPLES[format] | {"loss_mask": mask, "system": "Be brief."})
    assert turns(conversation) == [("system", ["Be brief."]), *plain]
    assert loss_of(conversation) == [True, True, False]
    assert turns(read(SAMPLES[format] | {"loss_mask": None, "system": " "})) == plain


def test_a_system_text_that_stands_twice_is_one_turn_and_two_texts_are_refused() -> None:
    raw = LLAVA | {"conversations": [{"from": "system", "value": "Be brief.\n"}, *LLAVA["conversations"]]}
    assert [role for role, _ in turns(read(raw | {"system": "Be brief."}))] == ["system", "user", "assistant"]
    assert refusals(raw | {"system": "Be long."}) == [
        ("system", "differs from the text of the system turn; keep one of them")
    ]
    assert refusals(LLAVA | {"system": 3}) == [("system", "must be a text, not 3")]


@pytest.mark.parametrize(
    ("mask", "flags", "field", "what"),
    [
        ([1], {}, "loss_mask", "has 1 entries for 2 turns; write one for each turn"),
        ([1, 2], {}, "loss_mask", "must be a list of true or false, or 1 or 0, one for each turn, not [1, 2]"),
        ("01", {}, "loss_mask", "must be a list of true or false, or 1 or 0, one for each turn, not '01'"),
        ([1, 1], {"loss": False}, "loss_mask.1", "contradicts the `loss` of this turn; keep one of them"),
    ],
)
def test_a_loss_mask_that_does_not_fit_its_turns_is_refused(mask: Any, flags: dict, field: str, what: str) -> None:
    talk = [CHAT["messages"][0], CHAT["messages"][1] | flags]
    assert refusals(CHAT | {"messages": talk, "loss_mask": mask}) == [(field, what)]
