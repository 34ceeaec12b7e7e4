"""The controls of an evaluation: other subjects' volumes, blank ones or none, and another wording."""

from collections.abc import Callable, Sequence

import pytest

from tests.conftest import make_conversation, make_prediction
from umbrella.conversations.schema import Conversation
from umbrella.evaluation.controls import SHOWN_LABEL, exchanged, make_controls, shuffled, text_only, volume_owners
from umbrella.evaluation.metrics import validation_metrics


def sex(i: int) -> str:
    return "male" if i % 2 else "female"


def split(size: int = 12) -> list[Conversation]:
    """For each subject a question about its sex, and a comparison with the next but one.

    File names say the sex of the subject, and so does the text of the first half of the questions.
    """
    conversations = []
    for i in range(size):
        j, metadata = (i + 2) % size, {"subject_id": f"s{i}", "subject_label": sex(i), "target": "sex"}
        own, other = ("sMRI", f"/{i}_{sex(i)}.nii"), ("sMRI", f"/{j}_{sex(j)}.nii")
        text = f"Is he or she, a {sex(i)} one, female?" if i < size // 2 else "Which sex?"
        alone = make_conversation(("user", [own, text]), ("assistant", sex(i)), task_id=f"{i}", metadata=metadata)
        turns = ("user", [other]), ("assistant", "Seen."), ("user", ["Which sex?", own]), ("assistant", sex(i))
        reference = {"reference_id": f"s{j}", "reference_label": sex(j)}
        compared = make_conversation(*turns, task_id=f"{i} with {j}", task_type="T3", metadata=metadata | reference)
        conversations += [alone, compared]
    return conversations


def accuracy(conversations: Sequence[Conversation], answer: Callable[[Conversation], str]) -> float:
    """The balanced accuracy of a model that gives these answers."""
    rows = []
    for c in conversations:
        probabilities = {"female": 0.5, "male": 0.5} | ({answer(c): 0.9} if answer(c) else {})
        rows.append(make_prediction(c.subject_id, c.label, probabilities=probabilities))
    return validation_metrics(rows)["eval/sex/balanced_accuracy"]


def by_image(conversation: Conversation) -> str:
    return conversation.volumes[-1].image_path.split("_")[1].split(".")[0] if conversation.volumes else ""


def by_text(conversation: Conversation) -> str:
    text = " ".join(item.text for item in conversation.conversations[0].content if item.type == "text")
    return next((sex for sex in ("female", "male") if f"a {sex} one" in text), "")


def test_a_score_from_the_text_stays_under_both_controls() -> None:
    conversations = [c for c in split() if by_text(c)]
    for of_one in (conversations, text_only(conversations), shuffled(conversations, 0)[0]):
        assert accuracy(of_one, by_text) == 1


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", [6, 8, 40])
def test_a_score_from_the_images_falls_to_chance_under_both_controls(size: int, seed: int) -> None:
    conversations = split(size)
    assert accuracy(conversations, by_image) == 1
    # With an odd number of subjects in a class half of them cannot be right.
    found = accuracy(shuffled(conversations, seed)[0], by_image)
    assert found == pytest.approx(0.5, abs=1e-9 if size % 4 == 0 else 0.17)
    assert accuracy(text_only(conversations), by_image) == 0


def test_each_volume_is_replaced_by_one_volume_of_a_subject_that_is_not_in_the_conversation() -> None:
    before = split()
    after, notes = shuffled(before, 0)
    assert [c.task_id for c in after] == [c.task_id for c in before]
    assert not notes
    owner = {file: subject for subject, files in volume_owners(before)["sMRI"].items() for file in files}
    pairs = set()
    for old, new in zip(before, after, strict=True):
        assert new.conversations[-1] == old.conversations[-1]
        assert old.subjects.isdisjoint(owner[v.image_path] for v in new.volumes)
        pairs |= {(a.image_path, b.image_path) for a, b in zip(old.volumes, new.volumes, strict=True)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 12
    assert after == shuffled(before, 0)[0] != shuffled(before, 1)[0]


def test_a_reference_owns_its_volume_without_a_question_of_its_own() -> None:
    compared = [c for c in split(4) if c.task_type == "T3"]
    assert volume_owners(compared)["sMRI"] == {f"s{i}": [f"/{i}_{sex(i)}.nii"] for i in range(4)}


def test_a_modality_of_one_subject_is_left_out_with_a_note() -> None:
    volumes = [("sMRI", "/0_female.nii"), ("dMRI", "/d.nii")]
    alone = make_conversation(("user", volumes), ("assistant", "x"), task_id="alone", metadata={"subject_id": "s0"})
    without = make_conversation(("user", "Hi"), ("assistant", "Hello"), task_id="without")
    others, notes = shuffled([*split(4), alone, without], 0)
    assert [c.task_id for c in others] == [*(c.task_id for c in split(4)), "without"]
    assert "in the place of one whom they are compared with" in notes[0], "of four there is no other way"
    assert notes[1] == "shuffled: 1 conversation is left out, as one subject only has dMRI"


def test_exchanged_volumes_have_the_same_or_another_label_and_references_stay() -> None:
    for other in (False, True):
        after = exchanged(split(), 0, other)
        assert [c.task_id for c in after] == [c.task_id for c in split()]
        for old, new in zip(split(), after, strict=True):
            *references, own = new.volumes
            assert references == old.volumes[:-1]
            assert (by_image(new) == old.label) != other
            assert own.image_path not in [v.image_path for v in old.volumes]
            assert new.metadata == old.metadata | {SHOWN_LABEL: by_image(new)}
        assert len({c.volumes[-1].image_path for c in after}) > 6
        assert after == exchanged(split(), 0, other) != exchanged(split(), 1, other)


def test_questions_with_candidates_of_their_own_are_not_exchanged() -> None:
    options = {"candidates": ["female", "male"]}
    mixed = [c.model_copy(update={"metadata": c.metadata | options}) if c.task_type == "T3" else c for c in split()]
    for other in (False, True):
        assert [c.task_id for c in exchanged(mixed, 0, other)] == [f"{i}" for i in range(12)]


def test_exchanged_numbers_are_the_nearest_or_a_standard_deviation_away() -> None:
    ages = {"a": 20, "b": 22, "c": 50, "d": 61}  # standard deviation 17.7
    conversations = []
    for s, modality in [*((s, "sMRI") for s in ages), ("d", "dMRI")]:
        turns = ("user", [(modality, f"/{s}_{modality}.nii"), "How old?"]), ("assistant", "?")
        metadata = {"subject_id": s, "subject_label": ages[s], "target": "age"}
        conversations.append(make_conversation(*turns, task_id=f"{s}_{modality}", metadata=metadata))
    both = [exchanged(conversations, 0, other) for other in (False, True)]
    near, far = ({c.task_id: (c.volumes[0].image_path, c.metadata[SHOWN_LABEL]) for c in of_one} for of_one in both)
    assert near["b_sMRI"] == ("/a_sMRI.nii", 20)
    assert near["c_sMRI"] == ("/d_sMRI.nii", 61)
    assert "d_dMRI" not in near, "no other subject has this modality"
    assert all(abs(ages[task_id[0]] - age) >= 17.7 for task_id, (_, age) in far.items())
    assert len(far) == 4


def test_another_wording_replaces_the_last_question_only() -> None:
    question = {"type": "text", "text": "Which sex?", "paraphrase": "Male or female?"}
    turns = [{"role": "user", "content": [question]}, {"role": "assistant", "content": "male"}]
    sample = {"task_id": "a", "task_type": "T1", "conversations": turns * 2}
    conversations = [Conversation.model_validate(sample), *split(4)]
    made, notes = make_controls(conversations, ["paraphrased", "blank", "paraphrased"], 0)
    [asked] = made["paraphrased"]
    assert [turn.content[0].text for turn in asked.conversations] == ["Which sex?", "male", "Male or female?", "male"]
    assert (list(made), notes) == (["paraphrased", "blank"], [])
    marks = [[(c.model_extra or {}).get("control") for c in of_one] for of_one in (*made.values(), conversations)]
    assert list(map(set, marks)) == [{"paraphrased"}, {"blank"}, {None}]


def test_text_only_keeps_everything_but_the_volumes() -> None:
    for before, after in zip(split(4), text_only(split(4)), strict=True):
        assert not after.volumes
        texts = [[i.text for i in turn.content if i.type == "text"] or [""] for turn in before.conversations]
        assert [[i.text for i in turn.content] for turn in after.conversations] == texts
        assert (after.label, after.metadata) == (before.label, before.metadata)
