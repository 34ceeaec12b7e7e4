"""The type: what a conversation says about itself, and what is refused because it contradicts itself."""

from typing import Any

import pytest
from pydantic import ValidationError

from umbrella.conversations.schema import Conversation, TextItem, bids_subject
from umbrella.conversations.value_checks import describe_errors, format_name, format_value


def sample(**changes: Any) -> dict[str, Any]:
    image = {"type": "image", "modality": "sMRI", "image_path": "a.nii"}
    return {
        "task_id": "t",
        "task_type": "T1",
        "images": [{"path": "a.nii", "token": "<image>", "modality": "sMRI"}],
        "conversations": [
            {"role": "user", "content": [{"type": "text", "text": "Sex?"}, image]},
            {"role": "assistant", "content": "male."},
        ],
        "metadata": {"subject_id": "sub-1", "subject_label": "male"},
        **changes,
    }


def refusals(raw: Any) -> list[tuple[str, str]]:
    with pytest.raises(ValidationError) as caught:
        Conversation.model_validate(raw)
    return describe_errors(caught.value)


def test_plain_strings_extra_keys_and_numbers_are_kept() -> None:
    metadata = {"subject_id": "s", "subject_label": 63.5, "target": "age", "site": {"name": "A"}}
    conversation = Conversation.model_validate(sample(metadata=metadata, subject_ids=["s"]))
    assert conversation.conversations[1].content == (TextItem(type="text", text="male."),)
    assert conversation.model_dump()["subject_ids"] == ["s"]
    assert conversation.model_dump()["images"][0]["token"] == "<image>"
    assert (conversation.label, conversation.target, conversation.subject_id) == (63.5, "age", "s")
    assert conversation.metadata["site"] == {"name": "A"}


def test_everybody_who_is_shown_is_a_subject() -> None:
    metadata = {"subject_id": "a", "reference_id": "b"}
    assert Conversation.model_validate(sample(metadata=metadata, subject_ids=["c", 4])).subjects == {"a", "b", "c", "4"}
    assert Conversation.model_validate(sample(metadata={})).subjects == {"t"}


def test_paths_are_rewritten_in_turns_and_images_and_nowhere_else() -> None:
    conversation = Conversation.model_validate(sample())
    moved = conversation.with_paths(lambda path: f"/scans/{path}")
    assert moved.volumes[0].image_path == moved.images[0].path == "/scans/a.nii"
    assert conversation.volumes[0].image_path == "a.nii"
    assert moved.with_paths(lambda path: "a.nii") == conversation


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"images": []}, "images", "the number of entries is 0, that of images in the turns is 1; list each"),
        (
            {"images": sample()["images"] * 2},
            "images",
            "the number of entries is 2, that of images in the turns is 1; list each",
        ),
        (
            {"images": [{"path": "b.nii", "modality": "sMRI"}]},
            "images.0.path",
            "'b.nii', but image 0 of the turns has 'a.nii'; they must be the same",
        ),
        (
            {"images": [{"path": "a.nii", "modality": "dMRI"}]},
            "images.0.modality",
            "'dMRI', but image 0 of the turns has 'sMRI'; they must be the same",
        ),
        ({"conversations": [{"role": "user", "content": "Hi"}], "images": []}, "conversations", "no assistant turn"),
        ({"conversations": [], "images": []}, "conversations", "is empty; a sample needs"),
        (
            {"conversations": [{"role": "user", "content": []}, sample()["conversations"][1]], "images": []},
            "conversations.0.content",
            "is empty; write a text, or leave the turn out",
        ),
    ],
)
def test_a_sample_that_contradicts_itself_says_where_and_how(changes: dict, field: str, message: str) -> None:
    [(found, what)] = refusals(sample(**changes))
    assert found == field
    assert what.startswith(message)


def test_a_fault_hides_none_of_the_others() -> None:
    wrong = sample(images=[{"path": "b.nii", "modality": 3}], metadata=3)
    wrong["conversations"][0]["role"] = "narrator"
    wrong["conversations"].append({"role": "user", "content": [{"type": "image", "modality": "sMRI"}]})
    assert [field for field, _ in refusals(wrong)] == [
        "conversations.0.role",
        "conversations.2.content.0.image_path",
        "images.0.modality",
        "metadata",
        "images",
    ]


def test_an_assistant_need_not_have_the_last_word() -> None:
    turns = [*sample()["conversations"], {"role": "user", "content": "Thanks."}]
    assert Conversation.model_validate(sample(conversations=turns)).answer == "male."


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"task_id": 7}, "task_id", "must be a text, not 7"),
        ({"metadata": [1]}, "metadata", "must be an object {...}, not [1]"),
        ({"conversations": {"a": {}}}, "conversations", "must be a list, not {'a': {}}"),
        ({"conversations": ["Hi"]}, "conversations.0", "must be an object {...}, not 'Hi'"),
        ({"role": "bot"}, "conversations.1.role", "'bot' is not known; use system, user or assistant"),
        ({"content": None}, "conversations.1.content", "must be a text or a list of items, not null"),
        ({"content": ["Hi"]}, "conversations.1.content.0", "must be an object {...}, not 'Hi'"),
        (
            {"content": [{"text": "Hi"}]},
            "conversations.1.content.0",
            'has no `type`; add "type": "text" or "type": "image"',
        ),
        (
            {"content": [{"type": "video"}]},
            "conversations.1.content.0",
            "{'type': 'video'} is of no known `type`; use text or image",
        ),
        ({"content": [{"type": "text"}]}, "conversations.1.content.0.text", "is missing; add it"),
    ],
)
def test_wrong_types_are_told_in_plain_words(change: dict, field: str, message: str) -> None:
    raw = sample()
    (raw if change.keys() <= raw.keys() else raw["conversations"][1]).update(change)
    assert (field, message) in refusals(raw)


def test_missing_fields_are_told_in_plain_words() -> None:
    assert refusals({}) == [
        ("task_id", "is missing; give every sample a name of its own in `task_id` or `id`"),
        ("task_type", "is missing; add it"),
        ("conversations", "is missing; add it"),
    ]


FINITE = "must be a text or a finite number, not"


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"task_id": " "}, "task_id", "is empty; give every sample a name of its own"),
        ({"task_id": "a\nb"}, "task_id", "'a\\nb' holds a line break or another control character; leave it out"),
        ({"task_type": ""}, "task_type", "is empty; name the task, as in T1"),
        ({"metadata": {"subject_label": {}}}, "metadata.subject_label", f"{FINITE} {{}}"),
        ({"metadata": {"subject_label": True}}, "metadata.subject_label", f"{FINITE} true"),
        ({"metadata": {"subject_label": float("inf")}}, "metadata.subject_label", f"{FINITE} inf"),
        ({"metadata": {"subject_id": ["a"]}}, "metadata.subject_id", "must be a text or a number, not ['a']"),
        ({"metadata": {"subject_id": ""}}, "metadata.subject_id", "is empty; name the subject, or leave it out"),
        ({"metadata": {"reference_id": {}}}, "metadata.reference_id", "must be a text or a number, not {}"),
        ({"subject_ids": ["a", None]}, "subject_ids.1", "must be a text or a number, not null"),
        ({"subject_ids": "a"}, "subject_ids", "must be a list, not 'a'"),
    ],
)
def test_names_and_labels_that_cannot_be_used_are_refused(changes: dict, field: str, message: str) -> None:
    assert refusals(sample(**changes)) == [(field, message)]


@pytest.mark.parametrize(
    ("flags", "field", "message"),
    [
        ({"weight": 0.5}, ".weight", "must be true or false, or 1 or 0, not 0.5"),
        ({"train": "no"}, ".train", "must be true or false, or 1 or 0, not 'no'"),
        ({"loss": True, "weight": 0}, "", "its loss flags contradict each other (loss: true, weight: 0); keep one of"),
    ],
)
def test_loss_flags_that_say_neither_yes_nor_no_are_refused(flags: dict, field: str, message: str) -> None:
    user, answer = sample()["conversations"]
    [(found, what)] = refusals(sample(conversations=[user, answer | flags]))
    assert found == f"conversations.1{field}"
    assert what.startswith(message)


def test_null_is_a_name_or_label_that_is_not_given() -> None:
    metadata = {"subject_id": None, "reference_id": None, "subject_label": None}
    conversation = Conversation.model_validate(sample(metadata=metadata, subject_ids=None))
    assert (conversation.subject_id, conversation.subjects, conversation.label) == ("t", {"t"}, None)


@pytest.mark.parametrize(
    ("stated", "subject"),
    [
        ({"metadata": {"subject_id": 7}}, "7"),
        ({"metadata": {"subject_id": 7.0}}, "7"),
        ({"metadata": {"subject_id": "7 "}}, "7"),
        ({"metadata": {"patient_id": 7.5}}, "7.5"),
        ({"metadata": {}, "subject_id": " 7"}, "7"),
        ({"metadata": {}, "patient_id": 7}, "7"),
        ({"metadata": {"reference_id": 8}, "subject_ids": ["8", 7.0]}, "7"),
        ({"metadata": {}, "subject_ids": ["8", 7.0]}, "t"),
    ],
)
def test_a_subject_is_the_same_however_it_is_stated(stated: dict, subject: str) -> None:
    conversation = Conversation.model_validate(sample(**stated))
    assert conversation.subject_id == subject
    assert subject in conversation.subjects


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


def test_values_are_shown_as_json_has_them_and_short() -> None:
    assert format_value([None, True, {"a": False}]) == "[null, true, {'a': false}]"
    assert (format_name("a b"), format_name("a\nb"), format_name("")) == ("a b", "'a\\nb'", "''")
    assert len(format_value("x" * 5000)) == len(format_name("x" * 5000)) == 300
    assert len(format_value(["x" * 5000, 10**400])) < 100
