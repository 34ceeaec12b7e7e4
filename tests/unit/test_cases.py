"""Where the model looks: the planted patch is found, along the right axes, and drawn where it lies."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from umbrella.config import load_settings
from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Batch, Collator
from umbrella.data.rendering import Renderer
from umbrella.evaluation.predictions import Prediction
from umbrella.evaluation.settings import EvaluateSettings
from umbrella.inference.cases import draw_cases, draw_volumes, effects_on_plane, make_blocks, occlusion, select_cases
from umbrella.inference.model import Umbrella
from umbrella.modality import Modality
from umbrella.models.build import build_model
from umbrella.volumes.slices import PLANES, orthogonal_slices
from umbrella.volumes.store import VolumeStore

HEAD = Modality(grid=(8, 12, 8), patch=(2, 4, 2))
SERIES = Modality(grid=(4, 4, 4, 6), patch=(2, 2, 2, 2))
MODALITIES = {"sMRI": HEAD, "fMRI": SERIES}
Talk = Callable[..., Conversation]


class Looker:
    """Stands in for an ``Umbrella`` whose answer depends on one voxel of one volume of a batch's rows."""

    def __init__(self, collate: Collator, renderer: Renderer, name: str, nth: int, voxel: tuple[int, ...]) -> None:
        self.collate, self.renderer, self.modalities = collate, renderer, MODALITIES
        self.name, self.nth, self.voxel = name, nth, voxel
        self.largest = 0

    def log_likelihoods(self, batch: Batch) -> list[float]:
        self.largest = max(self.largest, len(batch))
        group, per_row = batch.pixel_values[self.name], int(batch.num_images_per_sample[0])
        found = {int(run): volume[self.voxel] for run, volume in zip(group.run, group.voxels, strict=True)}
        return [float(found[self.nth + row * per_row]) for row in range(len(batch))]


@pytest.fixture
def store_here(tmp_path: Path) -> VolumeStore:
    return VolumeStore(tmp_path / "store", MODALITIES, 10_000)


@pytest.fixture
def asked(talk: Talk, tmp_path: Path) -> Conversation:
    """A series between two scans."""
    draw = np.random.default_rng(0)
    for name, modality in {"a": HEAD, "b": HEAD, "f": SERIES}.items():
        nib.save(
            nib.Nifti1Image(draw.normal(size=modality.grid).astype(np.float32), np.eye(4)), tmp_path / f"{name}.nii"
        )
    shown = [("sMRI", tmp_path / "a.nii"), ("fMRI", tmp_path / "f.nii"), ("sMRI", tmp_path / "b.nii")]
    return talk(("user", [*shown, "Sex?"]), ("assistant", "male."), metadata={"subject_label": "male", "target": "sex"})


@pytest.fixture
def looker(tokenizer: Any, store_here: VolumeStore) -> Callable[..., Looker]:
    renderer = Renderer(tokenizer, MODALITIES)
    return lambda *about: Looker(Collator(renderer, store_here), renderer, *about)


@pytest.mark.parametrize(
    ("name", "nth", "voxel", "patch"),
    [("sMRI", 0, (7, 0, 2), (3, 0, 1)), ("sMRI", 2, (1, 9, 7), (0, 2, 3)), ("fMRI", 1, (3, 1, 2, 5), (1, 0, 1, 2))],
)
def test_only_the_planted_patch_has_an_effect(
    asked: Conversation, looker: Callable[..., Looker], name: str, nth: int, voxel: Any, patch: Any, store_here: Any
) -> None:
    model = looker(name, nth, voxel)
    maps = occlusion(model, asked, "male.", batch_size=7)
    assert [m.shape for m in maps] == [HEAD.patch_grid, SERIES.patch_grid, HEAD.patch_grid]
    array = np.asarray(store_here.get(asked.volumes[nth].image_path, name), np.float32)
    value = array.transpose(1, 2, 3, 0)[voxel] if name == "fMRI" else array[voxel]
    # Hidden, the voxel has the mean of its volume.
    assert maps[nth][patch] == pytest.approx(value - array.mean(), abs=1e-2)
    assert sum(np.count_nonzero(m) for m in maps) == 1
    assert model.largest == 7


def test_a_model_that_reads_one_patch_is_seen_to(talk: Talk, tokenizer: Any, tmp_path: Path) -> None:
    settings = load_settings(overrides={"model.width": 16, "model.heads": 2})
    settings = settings.model_copy(update={"modalities": MODALITIES})
    renderer = Renderer(tokenizer, MODALITIES)
    torch.manual_seed(0)
    model = build_model(settings.model, MODALITIES, len(tokenizer), renderer.image_id)
    weight = model.embedder.by_modality["sMRI"].projection.weight
    with torch.no_grad():
        weight.zero_()  # blind
        weight[:, 5] = 0.1 * torch.randn(len(weight))  # but for one voxel of each patch
    volumes = VolumeStore(tmp_path / "planted", MODALITIES, 10_000)
    voxels = np.zeros(HEAD.grid, np.float32)
    voxels[0::2, 0::4, 0::2] = np.random.default_rng(1).normal(size=HEAD.patch_grid)
    voxels[4, 8 + 2, 2 + 1] = 20.0  # which is the sixth (0, 2, 1) of patch (2, 2, 1)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "planted.nii")
    umbrella = Umbrella(model, renderer, Collator(renderer, volumes), settings)
    question = talk(("user", [("sMRI", tmp_path / "planted.nii"), "Sex?"]), ("assistant", "male."))
    (effects,) = occlusion(umbrella, question, "male.")
    assert np.unravel_index(np.abs(effects).argmax(), effects.shape) == (2, 2, 1)
    others = np.delete(np.abs(effects).ravel(), np.abs(effects).argmax())
    assert others.max() < 0.5 * np.abs(effects).max()


@pytest.mark.parametrize("grid", [(6, 6, 6), (6, 6, 6, 8), (12, 12, 12), (1, 1, 1), (500, 1, 3), (7, 5, 9, 11)])
def test_blocks_are_few_and_are_the_whole_grid_once(grid: tuple[int, ...]) -> None:
    count = np.zeros(grid)
    blocks = list(make_blocks(grid))
    for block in blocks:
        count[block] += 1
    assert (count == 1).all()
    assert len(blocks) == count.size if count.size <= 256 else 100 < len(blocks) <= 256


def test_the_overlay_lies_as_the_planes_do() -> None:
    effects, voxels = np.zeros(HEAD.patch_grid), np.zeros(HEAD.grid)
    effects[3, 2, 1] = 1
    voxels[6:8, 8:12, 2:4] = 1  # the same patch in voxels
    for plane in orthogonal_slices(voxels, HEAD, None, centre=(7, 9, 2)):
        right, up = PLANES[plane.name]
        own = effects_on_plane(effects, plane, HEAD).repeat(HEAD.patch[up], 0).repeat(HEAD.patch[right], 1)
        assert own.any()
        np.testing.assert_array_equal(own > 0, plane.grey > 0)
    assert not any(
        effects_on_plane(effects, plane, HEAD).any()
        for plane in orthogonal_slices(voxels, HEAD, None, centre=(0, 0, 0))
    )


def test_the_picture_is_red_where_the_patch_lies_and_grey_elsewhere(asked: Conversation, store_here: Any) -> None:
    maps = [np.zeros(m.patch_grid) for m in (HEAD, SERIES, HEAD)]
    maps[0][3, 2, 3] = 0.5  # right, front, top
    picture, series, other = (
        np.asarray(Image.open(BytesIO(png)).convert("RGB"), int) for png in draw_volumes(asked, store_here, maps)
    )
    width = int(0.86 * picture.shape[1])  # without the colour bar
    red = (picture[..., 0] - picture[..., 2] > 60)[:, :width]
    rows, columns = np.nonzero(red)
    assert rows.max() < 0.55 * picture.shape[0]  # front of the axial plane, top of the others
    # Three planes, each with the patch at its right edge.
    thirds = np.flatnonzero(np.diff(np.unique(columns)) > 1)
    assert len(thirds) == 2
    # The scale is one for all volumes, so nothing is red where nothing has an effect.
    for empty in (series, other):
        assert not (empty[..., 0] - empty[..., 2] > 60)[:, : int(0.86 * empty.shape[1])].any()


def row(subject: str, label: Any = "male", right: float | None = None, said: Any = None, **others: Any) -> Prediction:
    probabilities = {} if right is None else {"male": right, "female": 1 - right}
    about = {"task_id": f"{subject}{right}{said}", "task_type": "T1", "target": "sex", "truth": "male."}
    return Prediction(**about, subject_id=subject, label=label, probabilities=probabilities, predicted=said, **others)


def test_the_best_and_the_worst_are_of_different_subjects() -> None:
    rows = [row("a", right=0.9), row("a", right=0.95), row("a", right=0.1), row("b", right=0.2), row("c", right=0.6)]
    assert [(kind, p.probabilities["male"]) for kind, p in select_cases(rows, 1)] == [("best", 0.95), ("worst", 0.2)]
    # Whoever is among the best is not among the worst, and few subjects give few.
    assert [p.subject_id for _, p in select_cases(rows, 5)] == ["a", "c", "b"]
    assert select_cases(rows, 0) == []


def test_numbers_are_picked_by_their_error_and_texts_by_their_likelihood() -> None:
    ages = [row("a", 60.0, said=61.0), row("b", 60.0, said=20.0), row("c", 60.0, said=None), row("d", 60, said=60)]
    assert [(k, p.subject_id) for k, p in select_cases(ages, 1)] == [("best", "d"), ("worst", "b")]
    texts = [row(s, None, answer_nll=n, answer_tokens=2) for s, n in (("a", 4.0), ("b", 1.0), ("c", 9.0))]
    assert [(k, p.subject_id) for k, p in select_cases(texts, 1)] == [("best", "b"), ("worst", "c")]
    words = [row("a", said="female"), row("b", said="male")]
    assert [(k, p.subject_id) for k, p in select_cases(words, 1)] == [("best", "b"), ("worst", "a")]


def test_cases_are_drawn_for_each_target(
    talk: Talk, asked: Conversation, looker: Callable[..., Looker], store_here: Any
) -> None:
    names = ("x", "y", "z")
    scan = talk(("user", [("sMRI", asked.volumes[0].image_path), "Sex?"]), ("assistant", "male."))
    conversations = {name: scan.model_copy(update={"task_id": name}) for name in names}
    rows = [replace(row(name, right=0.1 * i), task_id=name) for i, name in enumerate(names)]
    rows += [replace(one, target="other") for one in rows]
    model: Any = looker("sMRI", 0, (0, 0, 0))
    cases = draw_cases(model, conversations, store_here, rows, EvaluateSettings(pictures=1))
    assert [(c.kind, c.prediction.target, c.prediction.task_id) for c in cases] == [
        (kind, target, name) for target in ("sex", "other") for kind, name in (("best", "z"), ("worst", "x"))
    ]
    assert all(len(case.pictures) == 1 and case.mapped for case in cases)
    plain = draw_cases(model, conversations, store_here, rows[:3], EvaluateSettings(pictures=1, attention_maps=False))
    assert not any(case.mapped for case in plain)
    assert draw_cases(model, conversations, store_here, rows, EvaluateSettings(pictures=0)) == []
