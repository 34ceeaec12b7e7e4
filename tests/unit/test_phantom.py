"""The phantom cohort: same bytes, true affines, effects of the given size, balanced questions."""

import csv
import hashlib
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy import ndimage

from umbrella.base import UserError
from umbrella.cohorts.phantom import SPLITS, draw_subjects, make_cohort
from umbrella.cohorts.settings import CohortSettings
from umbrella.conversations.reading import read_conversations

SMALL = CohortSettings(subjects=12, spacing=8.0, functional_subjects=3, diffusion_subjects=6)
PLAIN = SMALL.model_copy(
    update={"deformation": 0.0, "noise": 0.0, "bias": 0.0, "functional_subjects": 0, "diffusion_subjects": 0}
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("phantom") / "cohort", SMALL)


def fingerprints(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples_of(folder: Path, split: str) -> list[dict[str, Any]]:
    lines = (folder / "conversations" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def participants(folder: Path) -> list[dict[str, str]]:
    with (folder / "participants.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def volume(folder: Path, subject: str, suffix: str = "T1w") -> nib.Nifti1Image:
    return nib.load(folder / "volumes" / f"{subject}_{suffix}.nii.gz")


def canonical(folder: Path, subject: str) -> np.ndarray:
    return nib.as_closest_canonical(volume(folder, subject)).get_fdata()


def test_another_seed_gives_other_volumes_and_more_subjects_the_same_ones(cohort: Path, tmp_path: Path) -> None:
    other = fingerprints(make_cohort(tmp_path / "seed", SMALL.model_copy(update={"seed": 1})))
    larger = fingerprints(make_cohort(tmp_path / "larger", SMALL.model_copy(update={"subjects": 15})))
    volumes = {name: digest for name, digest in fingerprints(cohort).items() if name.endswith("_T1w.nii.gz")}
    assert len(volumes) == 12
    assert all(other[name] != digest for name, digest in volumes.items())
    assert volumes.items() <= larger.items()


def test_the_affine_places_the_head_in_every_storage_orientation(cohort: Path) -> None:
    from nilearn.datasets import load_mni152_template

    def centre(image: nib.Nifti1Image) -> np.ndarray:
        return apply_affine(image.affine, ndimage.center_of_mass(image.get_fdata()))

    truth = centre(load_mni152_template(resolution=4))
    orientations = {}
    for subject in draw_subjects(SMALL):
        for modality in ("sMRI", "dMRI") if "dMRI" in subject.modalities else ("sMRI",):
            image = nib.load(cohort / subject.path(modality))
            orientations[subject.number] = "".join(nib.aff2axcodes(image.affine))
            np.testing.assert_allclose(centre(image), truth, atol=6)
            np.testing.assert_allclose(image.header.get_qform(), image.affine, atol=1e-4)
    assert orientations == {**dict.fromkeys(range(1, 13), "RAS"), 5: "LAS", 10: "PIR"}


def test_axes_are_not_mirrored_by_the_storage_orientation(tmp_path: Path) -> None:
    # Without anything random, subjects of one sex and no age effect are one volume, however it is stored.
    settings = PLAIN.model_copy(update={"age_ventricle": 0.0, "sex_scale": 0.0})
    folder = make_cohort(tmp_path / "c", settings)
    males = [canonical(folder, row["participant_id"]) for row in participants(folder) if row["sex"] == "male"]
    females = [canonical(folder, row["participant_id"]) for row in participants(folder) if row["sex"] == "female"]
    assert all(np.array_equal(group[0], data) for group in (males, females) for data in group)
    brighter = ndimage.center_of_mass(males[0] - females[0])
    assert apply_affine(nib.as_closest_canonical(volume(folder, "sub-0001")).affine, brighter)[0] > 20


def test_the_sex_effect_has_the_size_of_the_settings(tmp_path: Path) -> None:
    settings = PLAIN.model_copy(update={"age_ventricle": 0.0, "sex_scale": 0.1, "sex_region": 0.0})
    folder = make_cohort(tmp_path / "scale", settings)
    volumes = {row["sex"]: canonical(folder, row["participant_id"]).sum() for row in participants(folder)}
    assert volumes["male"] / volumes["female"] == pytest.approx(1.1**3, rel=0.02)

    # At 4 mm a voxel centre falls on the centre of the region.
    settings = PLAIN.model_copy(update={"age_ventricle": 0.0, "sex_scale": 0.0, "sex_region": 0.4, "spacing": 4.0})
    folder = make_cohort(tmp_path / "region", settings)
    brain = {row["sex"]: canonical(folder, row["participant_id"]) for row in participants(folder)}
    inside = brain["female"] > 0
    assert (brain["male"][inside] / brain["female"][inside]).max() == pytest.approx(1.4, rel=0.005)


def test_the_age_effect_grows_with_age_and_does_not_change_the_head(tmp_path: Path) -> None:
    settings = PLAIN.model_copy(update={"sex_scale": 0.0, "sex_region": 0.0, "spacing": 5.0, "age_ventricle": 0.8})
    folder = make_cohort(tmp_path / "c", settings)
    fluid, head = {}, {}
    for row in participants(folder):
        image = nib.as_closest_canonical(volume(folder, row["participant_id"]))
        data = image.get_fdata()
        points = apply_affine(image.affine, np.moveaxis(np.indices(data.shape), 0, -1))
        near = np.linalg.norm(points - [0, -15, 14], axis=-1) < 35
        fluid[int(row["age"])] = float((600 - data)[near].clip(min=0).sum())
        head[int(row["age"])] = float((data > 0).sum())
    ages = sorted(fluid)
    assert len(ages) > 8
    assert all(fluid[younger] < fluid[older] for younger, older in pairwise(ages))
    assert fluid[ages[-1]] > 1.3 * fluid[ages[0]]
    assert head[ages[-1]] == pytest.approx(head[ages[0]], rel=0.01)


def test_splits_have_different_subjects_and_are_balanced(cohort: Path) -> None:
    seen: dict[str, str] = {}
    for split in SPLITS:
        for sample in samples_of(cohort, split):
            for subject in sample["subject_ids"]:
                assert seen.setdefault(subject, split) == split
    assert seen == {row["participant_id"]: row["split"] for row in participants(cohort)}
    for subjects in (12, 50, 150):
        drawn = draw_subjects(SMALL.model_copy(update={"subjects": subjects}))
        counts = Counter((subject.split, subject.sex) for subject in drawn)
        assert all(counts[split, "male"] == counts[split, "female"] for split in SPLITS)
    assert [counts[split, "male"] for split in SPLITS] == [45, 15, 15]


def test_samples_show_volumes_that_exist_and_end_with_the_true_label(cohort: Path) -> None:
    files = [cohort / "conversations" / f"{split}.jsonl" for split in SPLITS]
    reading = read_conversations(files, root=cohort)
    assert reading.problems == []
    assert reading.notices == []
    truth = {row["participant_id"]: row for row in participants(cohort)}
    for c in reading.conversations:
        roles = [turn.role for turn in c.conversations]
        assert roles == ["user", "assistant"] * (2 if c.task_type == "T3" else 1)
        expected: Any = int(truth[c.subject_id]["age"]) if c.target == "age" else truth[c.subject_id]["sex"]
        assert (c.label, c.answer) == (expected, f"{expected} years." if c.target == "age" else f"{expected}.")
        assert c.subject_id in c.volumes[-1].image_path


def test_references_are_other_subjects_of_the_split_and_their_label_is_uninformative(tmp_path: Path) -> None:
    folder = make_cohort(tmp_path / "c", PLAIN.model_copy(update={"subjects": 40, "spacing": 10.0}))
    split_of = {row["participant_id"]: row["split"] for row in participants(folder)}
    for split in SPLITS:
        compared = [sample["metadata"] for sample in samples_of(folder, split) if sample["task_type"] == "T3"]
        for metadata in compared:
            assert metadata["reference_id"] != metadata["subject_id"]
            assert split_of[metadata["reference_id"]] == split
            same = metadata["reference_label"] == metadata["subject_label"]
            assert metadata["comparison_type"] == ("same" if same else "different")
        kinds = Counter(metadata["comparison_type"] for metadata in compared)
        assert kinds["same"] == kinds["different"] == len(compared) / 2
        pairs = Counter((metadata["subject_label"], metadata["comparison_type"]) for metadata in compared)
        counts = [pairs[label, kind] for label in ("male", "female") for kind in ("same", "different")]
        assert max(counts) - min(counts) <= 1


def test_every_split_has_all_modalities_with_true_headers(cohort: Path) -> None:
    for split in SPLITS:
        used = {image["modality"] for sample in samples_of(cohort, split) for image in sample["images"]}
        assert used == {"sMRI", "dMRI", "fMRI"}
    assert len(list(cohort.glob("volumes/*_bold.nii.gz"))) == SMALL.functional_subjects
    assert len(list(cohort.glob("volumes/*_FA.nii.gz"))) == SMALL.diffusion_subjects
    for subject in draw_subjects(SMALL):
        if "dMRI" in subject.modalities:
            anisotropy = nib.load(cohort / subject.path("dMRI")).get_fdata()
            assert anisotropy.min() == 0
            assert 0.5 < anisotropy.max() <= 1
        if "fMRI" in subject.modalities:
            series = nib.load(cohort / subject.path("fMRI"))
            assert series.header.get_zooms() == (16, 16, 16, 2)
            assert series.header.get_xyzt_units() == ("mm", "sec")
            assert series.shape[3] == 12
            assert series.get_fdata().std(axis=3).max() > 0


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(subjects: Any) -> Any:
        yield next(iter(subjects))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_cohort(tmp_path / "c", SMALL, interrupted)
    assert list(tmp_path.iterdir()) == []
    assert (make_cohort(tmp_path / "c", SMALL) / "cohort.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_two_concurrent_builds_give_one_cohort_of_the_same_bytes(cohort: Path, tmp_path: Path) -> None:
    def overtaken(subjects: Any) -> Any:
        make_cohort(tmp_path / "c", SMALL)
        return subjects

    assert fingerprints(make_cohort(tmp_path / "c", SMALL, overtaken)) == fingerprints(cohort)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_folder_with_the_cohort_is_used_and_one_with_other_content_is_an_error(cohort: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cohort.rglob("*")}
    make_cohort(cohort, SMALL)
    with pytest.raises(UserError, match=f"{cohort}: holds a phantom cohort of other settings"):
        make_cohort(cohort, SMALL.model_copy(update={"seed": 5}))
    assert {path: path.stat().st_mtime_ns for path in cohort.rglob("*")} == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a phantom cohort"):
        make_cohort(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
