"""The controls of an evaluation: a cue in the words is kept by both, a cue in the images by neither."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from umbrella.conversations.schema import Conversation
from umbrella.evaluation.controls import shuffled, text_only, volume_owners
from umbrella.evaluation.metrics import validation_metrics
from umbrella.evaluation.predictions import Prediction

Talk = Callable[..., Conversation]


def split(talk: Talk, size: int = 12, modality: str = "sMRI") -> list[Conversation]:
    """A question about the sex of each of so many subjects, and a comparison of each with the next but one.

    The file of a volume says the sex of whom it shows, and so do the words of the first half of the questions.
    """
    sexes = ["male" if i % 2 else "female" for i in range(size)]
    files = [f"/{i}_{sex}.nii" for i, sex in enumerate(sexes)]
    asked = []
    for i, sex in enumerate(sexes):
        about = {"subject_id": f"s{i}", "subject_label": sex, "target": "sex"}
        words = f"Is he or she, a {sex} one, female?" if i < size // 2 else "Which sex?"
        asked.append(
            talk(("user", [(modality, files[i]), words]), ("assistant", sex), task_id=f"{i} alone", metadata=about)
        )
        j = (i + 2) % size
        asked.append(
            talk(
                ("user", [(modality, files[j])]),
                ("assistant", "Seen."),
                ("user", ["Which sex?", (modality, files[i])]),
                ("assistant", sex),
                task_id=f"{i} with {j}",
                task_type="T3",
                metadata={**about, "reference_id": f"s{j}", "reference_label": sexes[j]},
            )
        )
    return asked


def accuracy(conversations: Sequence[Conversation], says: Callable[[Conversation], str]) -> float:
    """The balanced accuracy of a model that says this."""
    rows = []
    for c in conversations:
        probabilities = {"female": 0.5, "male": 0.5} | ({says(c): 0.9} if says(c) else {})
        rows.append(
            Prediction(c.task_id, c.task_type, c.subject_id, c.target, c.label, "", {}, (), probabilities, 1, 1)
        )
    return validation_metrics(rows)["eval/sex/balanced_accuracy"]


def by_image(conversation: Conversation) -> str:
    return conversation.volumes[-1].image_path.split("_")[1].split(".")[0] if conversation.volumes else ""


def by_words(conversation: Conversation) -> str:
    words = " ".join(item.text for item in conversation.conversations[0].content if item.type == "text")
    return next((sex for sex in ("female", "male") if f"a {sex} one" in words), "")


def test_a_cue_in_the_words_is_exposed_as_it_survives_both_controls(talk: Talk) -> None:
    asked = [c for c in split(talk) if by_words(c)]
    assert accuracy(asked, by_words) == 1
    assert accuracy(text_only(asked), by_words) == 1
    assert accuracy(shuffled(asked, 0)[0], by_words) == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", [6, 8, 40])
def test_a_reader_of_images_falls_to_chance_under_both_controls(talk: Talk, size: int, seed: int) -> None:
    asked = split(talk, size)
    assert accuracy(asked, by_image) == 1
    # With an odd number of subjects in a class half of them cannot be right.
    assert accuracy(shuffled(asked, seed)[0], by_image) == pytest.approx(0.5, abs=1e-9 if size % 4 == 0 else 0.17)
    assert accuracy(text_only(asked), by_image) == 0


def test_nobodys_volume_is_shown_where_they_are_and_each_has_one_stand_in(talk: Talk) -> None:
    asked = split(talk)
    others, notes = shuffled(asked, 0)
    assert [c.task_id for c in others] == [c.task_id for c in asked]
    assert not notes
    stands_for: dict[str, set[str]] = {}
    whose = {file: subject for subject, files in volume_owners(asked)["sMRI"].items() for file in files}
    for before, after in zip(asked, others, strict=True):
        assert after.conversations[-1] == before.conversations[-1]
        assert before.subjects.isdisjoint(whose[v.image_path] for v in after.volumes)
        for one, other in zip(before.volumes, after.volumes, strict=True):
            stands_for.setdefault(one.image_path, set()).add(other.image_path)
    assert {len(found) for found in stands_for.values()} == {1}
    assert len({*map(tuple, stands_for.values())}) == len(stands_for), "each stands for one"
    assert others == shuffled(asked, 0)[0] != shuffled(asked, 1)[0]


def test_a_reference_without_a_question_of_its_own_has_its_volume(talk: Talk) -> None:
    compared = [c for c in split(talk, 4) if c.task_type == "T3"]
    assert volume_owners(compared)["sMRI"] == {f"s{i}": [f"/{i}_{'male' if i % 2 else 'female'}.nii"] for i in range(4)}


def test_a_modality_of_one_subject_is_left_out_and_said(talk: Talk) -> None:
    asked = split(talk, 4)
    alone: dict[str, Any] = {"task_id": "alone", "metadata": {"subject_id": "s0"}}
    more = talk(("user", [("sMRI", "/0_female.nii"), ("dMRI", "/d.nii")]), ("assistant", "x"), **alone)
    silent = talk(("user", "Hi"), ("assistant", "Hello"), task_id="silent")
    others, notes = shuffled([*asked, more, silent], 0)
    assert [c.task_id for c in others] == [*(c.task_id for c in asked), "silent"]
    assert "in the place of one whom they are compared with" in notes[0], "of four there is no other way"
    assert notes[1] == "shuffled: 1 conversation is left out, as one subject only has dMRI"


def test_without_volumes_the_words_stay_and_a_turn_without_any_is_empty(talk: Talk) -> None:
    asked = split(talk, 4)
    for before, after in zip(asked, text_only(asked), strict=True):
        assert not after.volumes
        words = [[i.text for i in turn.content if i.type == "text"] or [""] for turn in before.conversations]
        assert [[i.text for i in turn.content] for turn in after.conversations] == words
        assert (after.label, after.metadata) == (before.label, before.metadata)
