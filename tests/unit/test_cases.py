"""The best and worst predictions of a report, and their occlusion maps."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import make_conversation, make_prediction
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


class OneVoxelModel:
    """An ``Umbrella`` whose log likelihood is one voxel of one volume."""

    def __init__(self, collate: Collator, name: str, number: int, voxel: tuple[int, ...]) -> None:
        self.collate, self.renderer, self.modalities = collate, collate.renderer, MODALITIES
        self.name, self.number, self.voxel = name, number, voxel

    def log_likelihoods(self, batch: Batch) -> list[float]:
        assert len(batch) <= 7
        group, per_row = batch.pixel_values[self.name], int(batch.num_images_per_sample[0])
        volumes = zip(group.run, group.separate().voxels, strict=True)
        found = {int(run): volume[self.voxel] for run, volume in volumes}
        return [float(found[self.number + row * per_row]) for row in range(len(batch))]


@pytest.fixture
def collate(tokenizer: Any, tmp_path: Path) -> Collator:
    return Collator(Renderer(tokenizer, MODALITIES), VolumeStore(tmp_path / "store", MODALITIES, 10_000))


@pytest.fixture
def conversation(tmp_path: Path) -> Conversation:
    """A question about a series between two volumes."""
    draw = np.random.default_rng(0)
    for name, modality in {"a": HEAD, "b": HEAD, "f": SERIES}.items():
        voxels = draw.normal(size=modality.grid).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{name}.nii")
    volumes = [("sMRI", tmp_path / "a.nii"), ("fMRI", tmp_path / "f.nii"), ("sMRI", tmp_path / "b.nii")]
    return make_conversation(("user", [*volumes, "Sex?"]), ("assistant", "male."))


@pytest.mark.parametrize(
    ("name", "number", "voxel", "patch"),
    [("sMRI", 0, (7, 0, 2), (3, 0, 1)), ("sMRI", 2, (1, 9, 7), (0, 2, 3)), ("fMRI", 1, (3, 1, 2, 5), (1, 0, 1, 2))],
)
def test_only_the_patch_that_the_answer_depends_on_has_an_effect(
    conversation: Conversation, collate: Collator, name: str, number: int, voxel: Any, patch: Any
) -> None:
    model: Any = OneVoxelModel(collate, name, number, voxel)
    maps = occlusion(model, conversation, "male.", batch_size=7)
    assert [m.shape for m in maps] == [HEAD.patch_grid, SERIES.patch_grid, HEAD.patch_grid]
    array = np.asarray(collate.store.get(conversation.volumes[number].image_path, name), np.float32)
    value = array.transpose(1, 2, 3, 0)[voxel] if name == "fMRI" else array[voxel]
    assert maps[number][patch] == pytest.approx(value - array.mean(), abs=1e-2), "a hidden voxel has the mean"
    assert sum(np.count_nonzero(m) for m in maps) == 1


def test_the_occlusion_map_of_a_model_is_largest_where_its_input_is(collate: Collator, tmp_path: Path) -> None:
    settings = load_settings(overrides={"model.width": 16, "model.heads": 2})
    settings = settings.model_copy(update={"modalities": MODALITIES})
    torch.manual_seed(0)
    renderer = collate.renderer
    model = build_model(settings.model, MODALITIES, len(renderer.tokenizer), renderer.image_id)
    weight = model.embedder.by_modality["sMRI"].projection.weight
    with torch.no_grad():
        weight.zero_()
        weight[:, 5] = 0.1 * torch.randn(len(weight))  # the model sees one voxel of each patch
    voxels = np.zeros(HEAD.grid, np.float32)
    voxels[0::2, 0::4, 0::2] = np.random.default_rng(1).normal(size=HEAD.patch_grid)
    voxels[4, 8 + 2, 2 + 1] = 20.0  # which is the sixth (0, 2, 1) of patch (2, 2, 1)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "planted.nii")
    question = make_conversation(("user", [("sMRI", tmp_path / "planted.nii"), "Sex?"]), ("assistant", "male."))
    (effects,) = map(np.abs, occlusion(Umbrella(model, renderer, collate, settings), question, "male."))
    assert np.unravel_index(effects.argmax(), effects.shape) == (2, 2, 1)
    assert np.sort(effects, axis=None)[-2] < 0.5 * effects.max()


@pytest.mark.parametrize("grid", [(6, 6, 6), (6, 6, 6, 8), (1, 1, 1), (500, 1, 3), (7, 5, 9, 11)])
def test_at_most_256_blocks_cover_the_grid_once(grid: tuple[int, ...]) -> None:
    count, blocks = np.zeros(grid), list(make_blocks(grid))
    for block in blocks:
        count[block] += 1
    assert (count == 1).all()
    assert len(blocks) == count.size if count.size <= 256 else 100 < len(blocks) <= 256


def test_effects_have_the_orientation_of_the_planes() -> None:
    effects, voxels = np.zeros(HEAD.patch_grid), np.zeros(HEAD.grid)
    effects[3, 2, 1] = 1
    voxels[6:8, 8:12, 2:4] = 1  # the same patch in voxels
    for plane in orthogonal_slices(voxels, HEAD, None, centre=(7, 9, 2)):
        right, up = PLANES[plane.name]
        own = effects_on_plane(effects, plane, HEAD).repeat(HEAD.patch[up], 0).repeat(HEAD.patch[right], 1)
        assert own.any()
        np.testing.assert_array_equal(own > 0, plane.grey > 0)
    outside = orthogonal_slices(voxels, HEAD, None, centre=(0, 0, 0))
    assert not any(effects_on_plane(effects, plane, HEAD).any() for plane in outside)


def test_the_picture_is_red_at_the_patch_and_nowhere_else(conversation: Conversation, collate: Collator) -> None:
    maps = [np.zeros(m.patch_grid) for m in (HEAD, SERIES, HEAD)]
    maps[0][3, 2, 3] = 0.5  # right, front, top
    pictures = [
        np.asarray(Image.open(BytesIO(png)).convert("RGB"), int)
        for png in draw_volumes(conversation, collate.store, maps)
    ]
    # Without the colour bar. The scale is one for all volumes, so nothing is red where nothing has an effect.
    red, *others = [(p[..., 0] - p[..., 2] > 60)[:, : int(0.86 * p.shape[1])] for p in pictures]
    assert not any(other.any() for other in others)
    rows, columns = np.nonzero(red)
    assert rows.max() < 0.55 * len(red)  # front of the axial plane, top of the others
    assert np.count_nonzero(np.diff(np.unique(columns)) > 1) == 2, "in each of three planes"


def likely(subject: str, male: float, **others: Any) -> Prediction:
    return make_prediction(subject, probabilities={"male": male, "female": 1 - male}, **others)


def test_the_best_and_the_worst_cases_are_of_different_subjects() -> None:
    rows = [likely("a", 0.9), likely("a", 0.95), likely("a", 0.1), likely("b", 0.2), likely("c", 0.6)]
    assert [(kind, p.probabilities["male"]) for kind, p in select_cases(rows, 1)] == [("best", 0.95), ("worst", 0.2)]
    assert [p.subject_id for _, p in select_cases(rows, 5)] == ["a", "c", "b"]
    assert select_cases(rows, 0) == []


@pytest.mark.parametrize(
    ("values", "make"),
    [
        ({"b": 20.0, "c": None, "a": 61.0, "d": 60.0}, lambda s, v: make_prediction(s, 60.0, predicted=v)),
        ({"b": 9.0, "a": 4.0, "d": 1.0}, lambda s, v: make_prediction(s, None, answer_nll=v, answer_tokens=2)),
        ({"b": "female", "d": "male"}, lambda s, v: make_prediction(s, predicted=v)),
    ],
)
def test_cases_are_ranked_by_error_by_likelihood_of_the_text_or_by_the_generated_class(
    values: dict[str, Any], make: Callable[[str, Any], Prediction]
) -> None:
    found = select_cases([make(subject, value) for subject, value in values.items()], 1)
    assert [(kind, p.subject_id) for kind, p in found] == [("best", "d"), ("worst", "b")]


def test_cases_are_drawn_for_each_target(conversation: Conversation, collate: Collator, tmp_path: Path) -> None:
    question = make_conversation(("user", [("sMRI", tmp_path / "a.nii"), "Sex?"]), ("assistant", "male."))
    rows = [likely(name, share, task_id=name) for name, share in (("x", 0.1), ("y", 0.5), ("z", 0.9))]
    rows += [likely("x", 0.1, task_id="x", target="other")]
    model: Any = OneVoxelModel(collate, "sMRI", 0, (0, 0, 0))

    def drawn(**settings: Any) -> list[tuple[Any, ...]]:
        settings = EvaluateSettings(pictures=1, batch_size=7, **settings)
        cases = draw_cases(model, dict.fromkeys("xyz", question), collate.store, rows, settings)
        return [(c.kind, c.prediction.target, c.prediction.task_id, len(c.pictures), c.mapped) for c in cases]

    expected = [("best", "sex", "z", 1), ("worst", "sex", "x", 1), ("best", "other", "x", 1)]
    assert drawn() == [(*case, True) for case in expected]
    assert drawn(attention_maps=False) == [(*case, False) for case in expected]
