"""The phantom cohort: same bytes, true affines, effects of the given size, balanced splits, a valid BIDS dataset."""

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
from umbrella.cohorts import phantom
from umbrella.cohorts.phantom import Subject, draw_subjects
from umbrella.cohorts.settings import CohortSettings
from umbrella.config import load_settings
from umbrella.conversations.reading import read_conversations

SPLITS = ("train", "validation", "test")
SMALL = CohortSettings(subjects=12, spacing=8.0, functional_subjects=3, diffusion_subjects=6)
PLAIN = SMALL.model_copy(
    update={"deformation": 0.0, "noise": 0.0, "bias": 0.0, "size": 0.0, "age_region": 0.0}
    | {"functional_subjects": 0, "diffusion_subjects": 0}
)


def make_cohort(
    folder: Path, settings: CohortSettings, progress: Any = lambda things, _: things, **others: Any
) -> Path:
    return phantom.make_cohort(folder, settings, progress, **others)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("phantom") / "cohort", SMALL)


def fingerprints(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "data.yaml")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples_of(folder: Path, split: str) -> list[dict[str, Any]]:
    lines = (folder / "conversations" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def participants(folder: Path) -> list[dict[str, str]]:
    with (folder / "participants.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def split_of(folder: Path) -> dict[str, str]:
    with (folder / "conversations" / "splits.tsv").open(encoding="utf-8") as file:
        return {row["participant_id"]: row["split"] for row in csv.DictReader(file, delimiter="\t")}


def sex_of(row: dict[str, str]) -> str:
    return {"M": "male", "F": "female"}[row["sex"]]


def volume(folder: Path, subject: str) -> nib.Nifti1Image:
    return nib.load(folder / subject / "anat" / f"{subject}_T1w.nii.gz")


def canonical(folder: Path, subject: str) -> np.ndarray:
    return nib.as_closest_canonical(volume(folder, subject)).get_fdata()


def test_another_seed_gives_other_volumes_and_more_subjects_the_same_ones(cohort: Path, tmp_path: Path) -> None:
    other = fingerprints(make_cohort(tmp_path / "seed", SMALL.model_copy(update={"seed": 1})))
    larger = fingerprints(make_cohort(tmp_path / "larger", SMALL.model_copy(update={"subjects": 16})))
    volumes = {name: digest for name, digest in fingerprints(cohort).items() if name.endswith("_T1w.nii.gz")}
    assert len(volumes) == 12
    assert all(other[name] != digest for name, digest in volumes.items())
    assert volumes.items() <= larger.items()  # of the same sex and age


def test_the_affine_places_the_head_in_every_storage_orientation(cohort: Path) -> None:
    from nilearn.datasets import load_mni152_template

    def centre(image: nib.Nifti1Image) -> np.ndarray:
        return apply_affine(image.affine, ndimage.center_of_mass(image.get_fdata()))

    truth = centre(load_mni152_template(resolution=4))
    orientations = {}
    for subject in draw_subjects(SMALL):
        for modality in ("sMRI", "dMRI") if "dMRI" in subject.modalities else ("sMRI",):
            (path,) = subject.paths(modality)
            image = nib.load(cohort / path)
            orientations[subject.number] = "".join(nib.aff2axcodes(image.affine))
            np.testing.assert_allclose(centre(image), truth, atol=12)  # the back of old brains is darker
            np.testing.assert_allclose(image.header.get_qform(), image.affine, atol=1e-4)
    assert orientations == {**dict.fromkeys(range(1, 13), "RAS"), 5: "LAS", 10: "PIR"}


def test_axes_are_not_mirrored_by_the_storage_orientation(tmp_path: Path) -> None:
    # Without anything random, subjects of one sex and no age effect are one volume, however it is stored.
    settings = PLAIN.model_copy(update={"age_ventricle": 0.0, "sex_scale": 0.0})
    folder = make_cohort(tmp_path / "c", settings)
    males = [canonical(folder, row["participant_id"]) for row in participants(folder) if row["sex"] == "M"]
    females = [canonical(folder, row["participant_id"]) for row in participants(folder) if row["sex"] == "F"]
    assert all(np.array_equal(group[0], data) for group in (males, females) for data in group)
    brighter = ndimage.center_of_mass(males[0] - females[0])
    assert apply_affine(nib.as_closest_canonical(volume(folder, "sub-0001")).affine, brighter)[0] > 15


def test_the_sex_effect_has_the_size_of_the_settings(tmp_path: Path) -> None:
    settings = PLAIN.model_copy(update={"age_ventricle": 0.0, "sex_scale": 0.1, "sex_region": 0.0})
    folder = make_cohort(tmp_path / "scale", settings)
    volumes = {sex_of(row): canonical(folder, row["participant_id"]).sum() for row in participants(folder)}
    assert volumes["male"] / volumes["female"] == pytest.approx(1.1**3, rel=0.02)

    # At 4 mm a voxel centre falls on the centre of the region.
    settings = PLAIN.model_copy(update={"age_ventricle": 0.0, "sex_scale": 0.0, "sex_region": 0.4, "spacing": 4.0})
    folder = make_cohort(tmp_path / "region", settings)
    brain = {sex_of(row): canonical(folder, row["participant_id"]) for row in participants(folder)}
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


def test_the_posterior_brain_darkens_with_age_and_heads_differ_in_size(tmp_path: Path) -> None:
    settings = PLAIN.model_copy(update={"sex_scale": 0.0, "sex_region": 0.0, "age_ventricle": 0.0})
    folder = make_cohort(tmp_path / "region", settings.model_copy(update={"age_region": 0.6}))
    posterior, frontal = {}, {}
    for row in participants(folder):
        data = canonical(folder, row["participant_id"])
        half = data.shape[1] // 2
        posterior[int(row["age"])], frontal[int(row["age"])] = data[:, :half].sum(), data[:, half:].sum()
    ages = sorted(posterior)
    assert all(posterior[younger] > posterior[older] for younger, older in pairwise(ages))
    lost = {part: 1 - of[ages[-1]] / of[ages[0]] for part, of in (("back", posterior), ("front", frontal))}
    assert lost["back"] > 3 * lost["front"]

    folder = make_cohort(tmp_path / "size", settings.model_copy(update={"size": 0.03}))
    sizes = [np.cbrt((canonical(folder, row["participant_id"]) > 0).sum()) for row in participants(folder)]
    assert np.std(sizes) / np.mean(sizes) == pytest.approx(0.03, rel=0.5)  # of 12 subjects


@pytest.mark.parametrize(("number", "seed"), [(12, 0), (12, 1), (14, 0), (24, 0), (50, 3), (100, 0), (150, 2)])
def test_families_are_in_one_split_and_each_split_has_two_subjects_of_each_sex(
    number: int, seed: int, tmp_path: Path
) -> None:
    settings = SMALL.model_copy(update={"subjects": number, "seed": seed})
    folder = make_cohort(tmp_path / "c", settings, volumes=False)
    splits, people = split_of(folder), {row["participant_id"]: row for row in participants(folder)}
    assert splits.keys() == people.keys()
    family = {name: row["family_id"] for name, row in people.items()}
    assert len({(family[name], split) for name, split in splits.items()}) == len(set(family.values())) < number
    sexes = Counter((split, people[name]["sex"]) for name, split in splits.items())
    assert min(sexes[split, sex] for split in SPLITS for sex in "MF") >= 2
    sizes = Counter(splits.values())
    held_out = max(4, 0.2 * number)
    assert sizes["validation"] == pytest.approx(held_out, abs=2)
    assert sizes["test"] == pytest.approx(held_out, abs=2)
    assert min(sizes.values()) >= 4


def test_site_does_not_tell_the_sex() -> None:
    for seed in range(3):
        subjects = draw_subjects(CohortSettings(seed=seed))
        for sites in ({s.site for s in subjects}, {"east", "west"}):
            counts = Counter((s.site, s.sex) for s in subjects if s.site in sites)
            assert all(counts[site, "male"] == counts[site, "female"] > 0 for site in sites)
        assert {s.site for s in subjects if len(s.modalities) > 1} == {"east"}


def test_the_default_cohort_has_every_modality_in_every_split_sessions_and_missing_values(tmp_path: Path) -> None:
    settings = load_settings().cohort
    folder = make_cohort(tmp_path / "c", settings, volumes=False)
    for split in SPLITS:
        assert {i["modality"] for s in samples_of(folder, split) for i in s["images"]} == {"sMRI", "dMRI", "fMRI"}
        assert {s["task_type"] for s in samples_of(folder, split)} == {"T1", "T2", "T3"}
    sizes = Counter(split_of(folder).values())
    assert sizes == {"train": 72, "validation": 24, "test": 24}
    subjects = draw_subjects(settings)
    two = [s.id for s in subjects if len(s.paths("sMRI")) == 2]
    sessions = {
        s["metadata"]["subject_id"] for n in SPLITS for s in samples_of(folder, n) if "session" in s["metadata"]
    }
    assert len(two) == 4
    assert sessions == set(two)
    missing = {key: {r["participant_id"] for r in participants(folder) if r[key] == "n/a"} for key in ("sex", "age")}
    for key, names in missing.items():
        assert 3 <= len(names) <= 4
        asked = {
            s["metadata"]["subject_id"] for n in SPLITS for s in samples_of(folder, n) if s["metadata"]["target"] == key
        }
        assert asked == {s.id for s in subjects} - names


def test_the_settings_of_the_importer_read_the_cohort(cohort: Path) -> None:
    from umbrella.data.splits import read_splits

    splits = read_splits(load_settings([cohort / "conversations" / "data.yaml"]), lambda things, _: things, SPLITS)
    assert splits.problems == []
    assert {name: len(of_split) for name, of_split in splits.splits.items()} == {
        name: len(samples_of(cohort, name)) for name in SPLITS
    }
    assert all(Path(path).is_relative_to(cohort) for path, _ in splits.volumes)


def test_samples_show_volumes_that_exist_and_end_with_the_true_label(cohort: Path) -> None:
    files = [cohort / "conversations" / f"{split}.jsonl" for split in SPLITS]
    reading = read_conversations(files, root=cohort)
    assert reading.problems == []
    assert reading.notices == []
    truth = {row["participant_id"]: row for row in participants(cohort)}
    for c in reading.conversations:
        row = truth[str(c.subject_id)]
        expected: Any = int(row["age"]) if c.target == "age" else sex_of(row)
        assert (c.label, c.answer) == (expected, f"{expected} years." if c.target == "age" else f"{expected}.")
        assert f"{c.subject_id}/" in c.volumes[-1].image_path


def test_comparisons_are_about_sex_and_their_reference_does_not_tell_it(tmp_path: Path) -> None:
    folder = make_cohort(tmp_path / "c", PLAIN.model_copy(update={"subjects": 40}), volumes=False)
    for split in SPLITS:
        compared = [s["metadata"] for s in samples_of(folder, split) if "reference_id" in s["metadata"]]
        assert {metadata["target"] for metadata in compared} == {"sex"}
        pairs = Counter((metadata["subject_label"], metadata["comparison_type"]) for metadata in compared)
        for label in ("male", "female"):
            assert abs(pairs[label, "same"] - pairs[label, "different"]) <= 1


def test_headers_of_diffusion_maps_and_series_are_true(cohort: Path) -> None:
    subjects = draw_subjects(SMALL)
    assert len(list(cohort.rglob("*_bold.nii.gz"))) == SMALL.functional_subjects
    assert len(list(cohort.rglob("*_param-FA_dwimap.nii.gz"))) == SMALL.diffusion_subjects

    def images(modality: str) -> list[nib.Nifti1Image]:
        having: list[Subject] = [s for s in subjects if modality in s.modalities]
        return [nib.load(cohort / path) for s in having for path in s.paths(modality)]

    for image in images("dMRI"):
        anisotropy = image.get_fdata()
        assert anisotropy.min() == 0
        assert 0.5 < anisotropy.max() <= 1
    for series in images("fMRI"):
        assert series.header.get_zooms() == (16, 16, 16, 2)
        assert series.header.get_xyzt_units() == ("mm", "sec")
        assert series.shape[3] == 12
        assert series.get_fdata().std(axis=3).max() > 0


def test_two_sessions_of_a_subject_differ_by_noise_only(tmp_path: Path) -> None:
    folder = make_cohort(tmp_path / "c", PLAIN.model_copy(update={"subjects": 16}))
    noisy = make_cohort(tmp_path / "noisy", PLAIN.model_copy(update={"subjects": 16, "noise": 0.03}))
    paths = draw_subjects(PLAIN.model_copy(update={"subjects": 16}))[14].paths("sMRI")
    assert paths == [f"sub-0015/{ses}/anat/sub-0015_{ses}_T1w.nii.gz" for ses in ("ses-1", "ses-2")]
    for place, equal in ((folder, True), (noisy, False)):
        first, second = (nib.load(place / path).get_fdata() for path in paths)
        assert np.array_equal(first, second) == equal


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(subjects: Any, what: str) -> Any:
        yield next(iter(subjects))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_cohort(tmp_path / "c", SMALL, interrupted)
    assert list(tmp_path.iterdir()) == []
    assert (make_cohort(tmp_path / "c", SMALL) / "conversations" / "cohort.md").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_two_concurrent_builds_give_one_cohort_of_the_same_bytes(cohort: Path, tmp_path: Path) -> None:
    def overtaken(subjects: Any, what: str) -> Any:
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
