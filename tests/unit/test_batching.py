"""A batch: padding, weights and volumes side by side, and slices that keep each sample's own volumes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import byte_tokenizer
from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Batch, Collator
from umbrella.data.rendering import Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.evaluation.controls import blank

NAMES = ("two", "none", "three")
BatchOf = Callable[..., Batch]


@pytest.fixture
def batch(batch_of: BatchOf) -> Batch:
    return batch_of(*NAMES, indices=[7, 3, 5])


def volumes(batch: Batch) -> dict[int, tuple[str, list]]:
    """Run of placeholders to the modality and voxels that stand there."""
    placed = [
        (int(run), name, voxels.tolist())
        for name, group in batch.pixel_values.items()
        for run, voxels in zip(group.run, group.separate().voxels, strict=True)
    ]
    return {run: (name, voxels) for run, name, voxels in sorted(placed)}


def expected_volumes(store: Any, *conversations: Conversation) -> dict[int, tuple[str, list]]:
    """Straight from the store; of a series of 6 or 8 frames the middle 6, time last."""
    items = [item for conversation in conversations for item in conversation.volumes]
    arrays = [store.get(item.image_path, item.modality) for item in items]
    middle = [a if a.ndim == 3 else np.moveaxis(a[(len(a) - 6) // 2 :][:6], 0, -1) for a in arrays]
    return {i: (item.modality, array.tolist()) for i, (item, array) in enumerate(zip(items, middle, strict=True))}


def test_rng_key_picks_the_window_of_each_series(examples: dict[str, Any], store: Any, batch_of: BatchOf) -> None:
    path = examples["three"].conversation.volumes[2].image_path  # 8 frames, windows of 6
    frames = np.moveaxis(store.get(path, "fMRI"), 0, -1)
    windows = [frames[..., start : start + 6].tolist() for start in range(3)]

    def window(*rng_key: int) -> int:
        return windows.index(batch_of("three", rng_keys=[rng_key]).pixel_values["fMRI"].voxels[0].tolist())

    drawn = [window(0, epoch, 7) for epoch in range(20)]
    assert set(drawn) == {0, 1, 2}
    assert drawn == [window(0, epoch, 7) for epoch in range(20)]


def test_blank_volumes_are_one_constant_that_does_not_depend_on_the_subject(
    cohort: dict[str, Conversation], tokenizer: Any, store: Any
) -> None:
    renderer = Renderer(tokenizer, store.modalities)
    conversations = [cohort["three"], *blank([cohort["three"]])]
    plain, empty = (Collator(renderer, store)([renderer.render(c)], MaskPolicy()) for c in conversations)
    assert torch.equal(plain.input_ids, empty.input_ids)
    for name, group in empty.pixel_values.items():
        assert group.voxels.shape == plain.pixel_values[name].voxels.shape
        assert not group.voxels.any()
        assert plain.pixel_values[name].voxels.any()
    scaled = {n: m.model_copy(update={"intensity": "percentiles"}) for n, m in store.modalities.items()}
    other: Any = SimpleNamespace(modalities=scaled)
    grey = Collator(renderer, other)([renderer.render(conversations[1])], MaskPolicy())
    assert all((group.voxels == 0.5).all() for group in grey.pixel_values.values())


def test_every_volume_is_at_its_own_run(batch: Batch, store: Any, cohort: dict[str, Conversation]) -> None:
    runs = {name: group.run.tolist() for name, group in batch.pixel_values.items()}
    assert runs == {"fMRI": [0, 4], "sMRI": [1, 2], "dMRI": [3]}
    assert volumes(batch) == expected_volumes(store, *(cohort[name] for name in NAMES))
    assert batch.num_images_per_sample.tolist() == [2, 0, 3]
    assert batch.image_mask.sum(1).tolist() == [5, 0, 6]


def test_padding_is_neither_attended_to_nor_a_target(batch: Batch, examples: dict[str, Any], tokenizer: Any) -> None:
    for row, name in enumerate(NAMES):
        size = len(examples[name].input_ids)
        assert batch.input_ids[row, :size].tolist() == examples[name].input_ids.tolist()
        assert set(batch.input_ids[row, size:].tolist()) <= {tokenizer.pad_token_id}
        assert batch.attention_mask[row].tolist() == [1] * size + [0] * (batch.input_ids.shape[1] - size)
        assert batch.loss_weights[row, size:].sum() == 0


def test_labels_are_the_supervised_tokens_and_minus_100_elsewhere(batch: Batch, tokenizer: Any) -> None:
    assert [tokenizer.decode(row[row != -100]) for row in batch.labels] == [
        "male.<|im_end|>\n",
        "Hello, you.<|im_end|>\n",
        "Seen.<|im_end|>\n63.5<|im_end|>\n",
    ]
    assert torch.equal(batch.labels == -100, batch.loss_weights == 0)


def test_pad_token_equal_to_the_end_token_does_not_unteach_stopping(
    talk: Callable[..., Conversation], store: Any
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    renderer = Renderer(tokenizer, {})
    batch = Collator(renderer, store)(
        [renderer.render(talk(("user", "Q"), ("assistant", text))) for text in ("abcdef", "a")], MaskPolicy()
    )
    assert batch.input_ids[1, -5:].tolist() == [tokenizer.eos_token_id] * 5
    assert [tokenizer.decode(row[row != -100]) for row in batch.labels] == ["abcdef<|im_end|>\n", "a<|im_end|>\n"]
    assert batch.loss_weights.sum(1).tolist() == [8, 3]


def test_samples_of_a_batch_are_read_by_index_slice_and_iteration(batch: Batch) -> None:
    assert len(batch) == 3
    assert [one.task_ids for one in batch] == [("two",), ("none",), ("three",)]
    assert batch[-1].task_ids == ("three",)
    with pytest.raises(IndexError):
        batch[3]


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 2), slice(1, 3), slice(None, None, -1)], ids=str)
def test_slice_keeps_all_fields_and_volumes_of_its_samples(
    batch: Batch, store: Any, cohort: dict[str, Conversation], rows: slice
) -> None:
    part, names = batch[rows], NAMES[rows]
    assert volumes(part) == expected_volumes(store, *(cohort[name] for name in names))
    assert part.num_images_per_sample.tolist() == [2, 0, 3][rows]
    assert torch.equal(part.loss_weights, batch.loss_weights[list(range(3))[rows], : part.input_ids.shape[1]])
    assert torch.equal(part.attention_mask, batch.attention_mask[list(range(3))[rows], : part.input_ids.shape[1]])
    assert (part.task_ids, part.sample_indices.tolist()) == (names, [7, 3, 5][rows])
    assert part.task_types == tuple(cohort[name].task_type for name in names)
    assert part.metadata == tuple(cohort[name].metadata for name in names)


def test_batch_of_text_has_no_volumes(batch_of: BatchOf) -> None:
    batch = batch_of("none", "none")
    assert batch.pixel_values == batch[0].pixel_values == {}
    assert not batch.image_mask.any()


def test_model_gets_tensors_only_and_all_of_them_move_to_a_device(batch: Batch) -> None:
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask", "pixel_values", "loss_weights"}
    moved = batch.to("meta")
    groups = moved.pixel_values.values()
    tensors = [moved.input_ids, moved.loss_weights, moved.labels, *(t for g in groups for t in (g.voxels, g.run))]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.task_ids, moved.metadata) == (batch.task_ids, batch.metadata)


def test_packed_samples_share_rows_in_their_order(examples: dict[str, Any], batch_of: BatchOf) -> None:
    names = ("two", "none", "three", "none", "two")
    sizes = [len(examples[name].input_ids) for name in names]
    packed, padded = (batch_of(*names, pack=pack) for pack in (sizes[0] + sizes[1], 0))
    assert [row.unique().tolist() for row in packed.attention_mask] == [[1, 2], [0, 1], [1, 2]]
    assert packed.input_ids[0].tolist() == [*examples["two"].input_ids, *examples["none"].input_ids]
    assert volumes(packed) == volumes(padded)
    assert (packed.loss_weights.sum(), packed.image_mask.sum()) == (padded.loss_weights.sum(), padded.image_mask.sum())
    assert len(batch_of("three", "none", pack=10).input_ids) == 2  # samples longer than a row get their own


@pytest.mark.parametrize("rows", [slice(0, 5), slice(1, 4), slice(4, None), slice(None, None, -1)], ids=str)
def test_slice_of_packed_rows_has_a_row_for_each_sample(batch_of: BatchOf, rows: slice) -> None:
    part, expected = (batch_of("two", "none", "three", "none", "two", pack=pack)[rows] for pack in (120, 0))
    for name in ("input_ids", "attention_mask", "loss_weights", "image_mask"):
        assert torch.equal(getattr(part, name), getattr(expected, name))
    assert volumes(part) == volumes(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pinned_batch_is_the_same(batch: Batch, examples: dict[str, Any], store: Any, tokenizer: Any) -> None:
    collate = Collator(Renderer(tokenizer, store.modalities), store, pin=True)
    pinned = collate([examples[name] for name in NAMES], MaskPolicy(), indices=[7, 3, 5])
    assert all(group.voxels.is_pinned() for group in pinned.pixel_values.values())
    assert pinned.input_ids.is_pinned()
    assert torch.equal(pinned.loss_weights, batch.loss_weights)
    assert volumes(pinned) == volumes(batch)
