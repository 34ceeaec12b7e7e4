"""The subjects of the phantom cohort, and their conversations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umbrella.cohorts.settings import CohortSettings

SPLITS = ("train", "validation", "test")
SUFFIXES = {"sMRI": "T1w", "dMRI": "FA", "fMRI": "bold"}
# Tokens are bytes in the tiny model, so the texts are short.
SEX_QUESTIONS = ("What is the sex of this subject?", "Is this subject male or female?")
AGE_QUESTIONS = ("How old is this subject, in years?", "What is the age of this subject, in years?")


@dataclass(frozen=True)
class Subject:
    """One subject. Seed and number determine sex and age; all settings determine split and modalities."""

    number: int
    """1 for the first subject."""
    sex: str
    """"male" or "female"."""
    age: int
    """Years, 20 to 80."""
    split: str
    """One of ``SPLITS``."""
    modalities: tuple[str, ...]
    """Modalities with a volume, in the order of ``SUFFIXES``; sMRI is always the first."""

    @property
    def id(self) -> str:
        """The identifier in file names and tables, such as "sub-0001"."""
        return f"sub-{self.number:04d}"

    def path(self, modality: str) -> str:
        """Path of the volume of a modality, relative to the folder of the cohort."""
        return f"volumes/{self.id}_{SUFFIXES[modality]}.nii.gz"


def generator(seed: int, number: int, purpose: str) -> np.random.Generator:
    """The random generator of one subject (or pair of subjects) for one purpose.

    Samples do not depend on earlier ones, so a larger cohort contains the volumes of a smaller one.
    """
    return np.random.default_rng([seed, number, *purpose.encode()])


def draw_subjects(settings: CohortSettings) -> list[Subject]:
    """Sample the subjects of a cohort, in the order of their numbers.

    Subjects 1 and 2, 3 and 4, ... are pairs of one male and one female subject. Splits are made of pairs, so each is
    balanced; where the number is odd, the subject without a partner is in the training split.
    """
    numbers = range(1, settings.subjects + 1)
    pairs = settings.subjects // 2
    # A held-out split needs two pairs: a comparison with the same sex needs two subjects of that sex.
    held_out = max(2, round(0.2 * pairs))
    shuffled = generator(settings.seed, 0, "split").permutation(pairs)
    split_of_pair = dict.fromkeys(shuffled[:held_out].tolist(), "validation")
    split_of_pair |= dict.fromkeys(shuffled[held_out : 2 * held_out].tolist(), "test")
    splits = {number: split_of_pair.get((number - 1) // 2, "train") for number in numbers}

    # Take the first subjects of each split, in proportion to its size: sort by the rank within the split over its size.
    members = {split: [number for number in numbers if splits[number] == split] for split in SPLITS}
    early = sorted(numbers, key=lambda number: members[splits[number]].index(number) / len(members[splits[number]]))
    having = {
        "sMRI": set(numbers),
        "dMRI": set(early[: settings.diffusion_subjects]),
        "fMRI": set(early[: settings.functional_subjects]),
    }

    subjects = []
    for number in numbers:
        male_first = generator(settings.seed, (number - 1) // 2, "sex").random() < 0.5
        sex = "male" if male_first == (number % 2 == 1) else "female"
        age = int(generator(settings.seed, number, "age").integers(20, 81))
        modalities = tuple(modality for modality in SUFFIXES if number in having[modality])
        subjects.append(Subject(number, sex, age, splits[number], modalities))
    return subjects


def split_conversations(subjects: Sequence[Subject], seed: int) -> list[dict[str, Any]]:
    """Make all conversations about the subjects of one split, as samples of the v2 conversation format.

    ``subjects`` are all members of the split, in pairs as ``draw_subjects`` makes them. Of each pair, one is compared
    with a reference of the same sex and the other with one of the other sex, so repeating the reference's label is
    right half of the time. Image paths are relative to the cohort's folder.
    """
    samples = []
    for position, subject in enumerate(subjects):
        rng = generator(seed, subject.number, "conversations")
        sex_question = SEX_QUESTIONS[rng.integers(2)]
        age_question = AGE_QUESTIONS[rng.integers(2)]
        samples += [
            _sample(subject, "sex_classification", [[_image(subject, "sMRI"), _text(sex_question)]]),
            _sample(subject, "age_estimation", [[_image(subject, "sMRI"), _text(age_question)]]),
        ]

        # Alternate between pairs which sex is compared with a reference of the same sex.
        same = (position // 2 + (subject.sex == "male")) % 2 == 0
        candidates = [other for other in subjects if other != subject and (other.sex == subject.sex) == same]
        reference = candidates[rng.integers(len(candidates))]
        turns = [
            [_text(f"This is a scan of a {reference.sex} subject, for reference."), _image(reference, "sMRI")],
            [_text("I have looked at the reference scan.")],
            [_text(f"Compare with it. {sex_question}"), _image(subject, "sMRI")],
        ]
        samples.append(_sample(subject, "sex_classification_via_comparison", turns, reference))

        if len(subject.modalities) > 1:
            others = [_image(subject, modality) for modality in subject.modalities[1:]]
            turns = [[_image(subject, "sMRI"), _text("More scans of this subject:"), *others, _text(sex_question)]]
            samples.append(_sample(subject, "sex_classification_multimodal", turns))
    return samples


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _image(subject: Subject, modality: str) -> dict[str, str]:
    return {"type": "image", "modality": modality, "image_path": subject.path(modality)}


def _sample(
    subject: Subject, task: str, turns: list[list[dict[str, str]]], reference: Subject | None = None
) -> dict[str, Any]:
    """Make a sample: the given turns, user first, followed by the correct answer."""
    target = "age" if task == "age_estimation" else "sex"
    answer = f"{subject.age} years." if target == "age" else f"{subject.sex}."
    task_id = f"{subject.id}_{task}"
    metadata: dict[str, Any] = {
        "subject_id": subject.id,
        "subject_label": subject.age if target == "age" else subject.sex,
        "task": task,
        "target": target,
        "age": subject.age,
        "sex": subject.sex,
    }
    task_type = "T2" if task == "sex_classification_multimodal" else "T1"
    if reference is not None:
        task_type = "T3"
        metadata |= {
            "reference_id": reference.id,
            "reference_label": reference.sex,
            "comparison_type": "same" if reference.sex == subject.sex else "different",
        }
    images = [item for content in turns for item in content if item["type"] == "image"]
    return {
        "task_id": task_id,
        "task_type": task_type,
        "subject_ids": [subject.id] if reference is None else [reference.id, subject.id],
        "modalities": [item["modality"] for item in images],
        "images": [{"path": i["image_path"], "token": "<image>", "modality": i["modality"]} for i in images],
        "conversations": [
            {"role": "user" if position % 2 == 0 else "assistant", "content": content}
            for position, content in enumerate([*turns, [_text(answer)]])
        ],
        "metadata": metadata,
    }
