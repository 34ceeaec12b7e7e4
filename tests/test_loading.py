"""The data of a run: both splits read and checked, filters, the fingerprint, and the filling of the volume store."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from umbrella.base import UserError
from umbrella.config import Settings, load_settings
from umbrella.data.loading import Splits, count_samples, fill_store, load_splits, open_store, phantom_folder

SAMPLES = {  # split to (task id, task type, subject, modalities)
    "train": [("a_sex", "T1", "a", ["sMRI"]), ("a_all", "T2", "a", ["sMRI", "dMRI"]), ("b_sex", "T1", "b", ["dMRI"])],
    "validation": [("c_sex", "T1", "c", ["sMRI"]), ("d_age", "T1", "d", ["sMRI"])],
}


def plain(things: Sequence, what: str) -> Iterable:
    return things


def write(folder: Path, split: str, samples: list[tuple[str, str, str, list[str]]]) -> None:
    lines = []
    for task, kind, subject, modalities in samples:
        items = [{"type": "image", "modality": m, "image_path": f"{subject}_{m}.nii"} for m in modalities]
        sample = {
            "task_id": task,
            "task_type": kind,
            "images": [{"path": item["image_path"], "modality": item["modality"]} for item in items],
            "conversations": [{"role": "user", "content": items}, {"role": "assistant", "content": "male."}],
            "metadata": {"subject_id": subject},
        }
        for item in items:
            voxels = np.random.default_rng(0).normal(size=(5, 4, 4)).astype(np.float32)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / item["image_path"])
        lines.append(json.dumps(sample))
    (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, samples in SAMPLES.items():
        write(folder, split, samples)
    return folder


def settings_of(folder: Path, **data: Any) -> Settings:
    paths = {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")}
    overrides = {f"data.{name}": value for name, value in (paths | data).items()}
    return load_settings(overrides={"resources.storage": str(folder.parent / "runs")} | overrides)


def tasks(splits: Splits) -> list[list[str]]:
    return [[c.task_id for c in split] for split in (splits.train, splits.validation)]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, [["a_sex", "a_all", "b_sex"], ["c_sex", "d_age"]]),
        ({"modality": "sMRI"}, [["a_sex"], ["c_sex", "d_age"]]),
        ({"task_filter": "T1"}, [["a_sex", "b_sex"], ["c_sex", "d_age"]]),
        ({"task_filter": "sex", "modality": "sMRI"}, [["a_sex"], ["c_sex"]]),
    ],
)
def test_filters_keep_a_modality_a_task_type_or_task_ids(folder: Path, filters: dict, kept: list) -> None:
    settings = settings_of(folder, **filters)
    assert tasks(load_splits(settings, plain)) == kept
    assert count_samples(settings) == {"train": len(kept[0]), "validation": len(kept[1])}


def test_a_split_that_filters_leave_empty_is_named_with_the_filters(folder: Path) -> None:
    message = r"validation\.jsonl: none of its 2 conversations is left after data\.modality='dMRI'"
    with pytest.raises(UserError, match=message):
        load_splits(settings_of(folder, modality="dMRI"), plain)


def test_training_data_without_validation_data_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.validation is not set"):
        load_splits(settings_of(folder, validation=""), plain)


def test_a_subject_in_both_splits_is_refused(folder: Path) -> None:
    write(folder, "validation", [("a_age", "T1", "a", ["sMRI"]), ("c_sex", "T1", "c", ["sMRI"])])
    with pytest.raises(UserError, match=r"1 subjects are in both data\.train and data\.validation, a among them"):
        load_splits(settings_of(folder), plain)


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(folder: Path) -> None:
    def fingerprint(of: Path) -> str:
        return load_splits(settings_of(of), plain).fingerprint

    first = fingerprint(folder)
    moved = folder.parent / "elsewhere"
    shutil.copytree(folder, moved)
    assert fingerprint(moved) == first
    seen = {first}

    def change(file: str, old: str, new: str) -> None:
        path = moved / file
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        seen.add(fingerprint(moved))

    change("train.jsonl", "male.", "female.")
    change("validation.jsonl", "c_sex", "c_sex2")
    nib.save(nib.Nifti1Image(np.ones((9, 4, 4), np.float32), np.eye(4)), moved / "d_sMRI.nii")
    seen.add(fingerprint(moved))
    splits = load_splits(settings_of(moved), plain)
    seen.add(Splits([*splits.train, splits.validation[0]], splits.validation[1:]).fingerprint)
    assert len(seen) == 5


def test_filling_the_store_names_every_bad_volume_and_keeps_the_good_ones(folder: Path) -> None:
    settings = settings_of(folder)
    (folder / "a_dMRI.nii").write_bytes(b"no image")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), folder / "c_sMRI.nii")
    splits, store = load_splits(settings, plain), open_store(settings)
    with pytest.raises(UserError) as caught:
        fill_store(splits, store, plain)
    damaged, empty = str(caught.value).split("\n")
    assert damaged.startswith(f"{folder / 'a_dMRI.nii'}: cannot be read as an image")
    assert empty == f"{folder / 'c_sMRI.nii'}: every voxel is 0"
    assert len(list(store.folder.glob("*.npy"))) == 3


def test_without_data_a_phantom_cohort_is_made_once_and_counted_before(
    small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    base = {"resources.storage": str(tmp_path), "cohort.spacing": 10.0, "cohort.functional_subjects": 2}
    made: list[str] = []

    def watch(things: Sequence, what: str) -> Iterable:
        made.append(what)
        return things

    filters: list[dict] = [{}, {"data.task_filter": "T3"}, {"data.modality": "sMRI"}, {"data.task_filter": "age"}]
    every = [small_settings(base | others) for others in filters]
    before = [count_samples(settings) for settings in every]
    assert list(tmp_path.iterdir()) == []
    for settings, drawn in zip(every, before, strict=True):
        splits = load_splits(settings, watch)
        assert drawn == count_samples(settings) == {"train": len(splits.train), "validation": len(splits.validation)}
    assert made == ["making the phantom cohort"]
    assert [path.name for path in tmp_path.iterdir()] == [phantom_folder(every[0]).name]
    assert fill_store(load_splits(every[0], watch), open_store(every[0]), watch) > 8

    with pytest.raises(UserError, match="the phantom cohort's train split: none of its"):
        count_samples(small_settings(base | {"cohort.seed": 1, "data.task_filter": "nothing"}))
