"""A batch: padding, weights and volumes side by side, and slices that keep each sample's own volumes."""

from typing import Any

import numpy as np
import pytest
import torch

from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Batch, collate, packed_rows
from umbrella.data.settings import MaskPolicy

NAMES = ("two", "none", "three")


def make(examples: dict[str, Any], store: Any, tokenizer: Any, *names: str, **options: Any) -> Batch:
    return collate(
        [examples[name] for name in names],
        MaskPolicy(),
        store,
        image_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_id=tokenizer.pad_token_id,
        **options,
    )


@pytest.fixture
def batch(examples: dict[str, Any], store: Any, tokenizer: Any) -> Batch:
    return make(examples, store, tokenizer, *NAMES, indices=[7, 3, 5])


def volumes(batch: Batch) -> dict[int, tuple[str, list]]:
    """Run of placeholders to the modality and voxels that stand there."""
    placed = [
        (int(run), name, voxels.tolist())
        for name, group in batch.pixel_values.items()
        for run, voxels in zip(group.run, group.voxels, strict=True)
    ]
    return {run: (name, voxels) for run, name, voxels in sorted(placed)}


def expected_volumes(store: Any, *conversations: Conversation) -> dict[int, tuple[str, list]]:
    """Straight from the store; of a series of 6 or 8 frames the middle 6, time last."""
    items = [item for conversation in conversations for item in conversation.volumes]
    arrays = [store.get(item.image_path, item.modality) for item in items]
    middle = [a if a.ndim == 3 else np.moveaxis(a[(len(a) - 6) // 2 :][:6], 0, -1) for a in arrays]
    return {i: (item.modality, array.tolist()) for i, (item, array) in enumerate(zip(items, middle, strict=True))}


def test_a_draw_picks_the_window_of_each_series(examples: dict[str, Any], store: Any) -> None:
    path = examples["three"].conversation.volumes[2].image_path  # 8 frames, windows of 6
    frames = np.moveaxis(store.get(path, "fMRI"), 0, -1)
    windows = [frames[..., start : start + 6].tolist() for start in range(3)]

    def seen(*rng_key: int) -> int:
        batch = collate([examples["three"]], MaskPolicy(), store, 0, 0, rng_keys=[rng_key])
        return windows.index(batch.pixel_values["fMRI"].voxels[0].tolist())

    assert {seen(0, epoch, 7) for epoch in range(20)} == {0, 1, 2}
    assert [seen(0, epoch, 7) for epoch in range(20)] == [seen(0, epoch, 7) for epoch in range(20)]


def test_every_volume_stands_at_its_own_run(batch: Batch, store: Any, cohort: dict[str, Conversation]) -> None:
    assert {name: group.run.tolist() for name, group in batch.pixel_values.items()} == {
        "fMRI": [0, 4],
        "sMRI": [1, 2],
        "dMRI": [3],
    }
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
    assert batch.input_ids.shape[1] == max(len(example.input_ids) for example in examples.values())


def test_labels_are_the_supervised_tokens_and_minus_100_elsewhere(batch: Batch, tokenizer: Any) -> None:
    assert [tokenizer.decode(row[row != -100]) for row in batch.labels] == [
        "male.<|im_end|>\n",
        "Hello, you.<|im_end|>\n",
        "Seen.<|im_end|>\n63.5<|im_end|>\n",
    ]
    assert torch.equal(batch.labels == -100, batch.loss_weights == 0)


def test_a_batch_is_read_like_a_sequence_of_samples(batch: Batch) -> None:
    assert len(batch) == 3
    assert [one.task_ids for one in batch] == [("two",), ("none",), ("three",)]
    assert batch[-1].task_ids == ("three",)
    assert batch[1:].task_ids == ("none", "three")
    assert batch[::-1].task_ids == ("three", "none", "two")
    assert len(batch[3:]) == 0
    with pytest.raises(IndexError):
        batch[3]


def test_a_batch_is_read_like_a_mapping_of_fields(batch: Batch) -> None:
    assert set({**batch}) == set(batch.keys()) == set(dict(batch.items()))
    assert {"input_ids", "labels", "pixel_values", "metadata"} < set(batch.keys())
    assert batch["input_ids"] is batch.input_ids
    assert "input_ids" in batch
    assert "loss" not in batch
    assert len(batch.values()) == len(batch.keys())
    with pytest.raises(KeyError):
        batch["loss"]


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 2), slice(2, 3), slice(1, 3), slice(None, None, -1)])
def test_a_slice_keeps_each_samples_own_volumes(
    batch: Batch, store: Any, cohort: dict[str, Conversation], rows: slice
) -> None:
    part = batch[rows]
    assert volumes(part) == expected_volumes(store, *(cohort[name] for name in NAMES[rows]))
    assert part.num_images_per_sample.tolist() == [2, 0, 3][rows]
    # Order of the volumes within a group is free, but run and voxels stay together: the model reads the run.
    assert torch.equal(part.loss_weights, batch.loss_weights[list(range(3))[rows]])


def test_a_batch_of_text_has_no_volumes(examples: dict[str, Any], store: Any, tokenizer: Any) -> None:
    batch = make(examples, store, tokenizer, "none", "none")
    assert batch.pixel_values == batch[0].pixel_values == {}
    assert not batch.image_mask.any()


def test_the_model_gets_what_it_accepts_and_nothing_else(batch: Batch) -> None:
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask", "pixel_values", "loss_weights"}


def test_what_is_known_of_a_sample_survives_slicing_and_moving(batch: Batch) -> None:
    moved = batch.to("meta")
    groups = moved.pixel_values.values()
    tensors = [moved.input_ids, moved.loss_weights, moved.labels, *(t for g in groups for t in (g.voxels, g.run))]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.task_ids, moved.metadata) == (batch.task_ids, batch.metadata)
    for one in (batch[2], batch.to("cpu")[1:][1]):
        assert (one.task_ids, one.task_types) == (("three",), ("T3",))
        assert one.metadata == ({"subject_id": "b", "subject_label": 63.5},)
    assert batch[2].sample_indices.tolist() == [5]


def test_examples_share_rows_in_their_order(examples: dict[str, Any], store: Any, tokenizer: Any) -> None:
    names = ("two", "none", "three", "none", "two")
    sizes = [len(examples[name].input_ids) for name in names]
    packed, padded = (make(examples, store, tokenizer, *names, pack=pack) for pack in (sizes[0] + sizes[1], 0))
    assert [row.unique().tolist() for row in packed.attention_mask] == [[1, 2], [0, 1], [1, 2]]
    assert packed.input_ids[0].tolist() == [*examples["two"].input_ids, *examples["none"].input_ids]
    assert volumes(packed) == volumes(padded)
    assert (packed.loss_weights.sum(), packed.image_mask.sum()) == (padded.loss_weights.sum(), padded.image_mask.sum())
    assert packed_rows([3, 9, 2, 2, 1], 5) == [[0], [1], [2, 3, 4]]
    assert packed_rows([3, 9, 2], 0) == [[0], [1], [2]]


@pytest.mark.parametrize("rows", [slice(0, 5), slice(1, 4), slice(4, None), slice(None, None, -1)])
def test_a_slice_of_shared_rows_has_a_row_for_each_sample(
    examples: dict[str, Any], store: Any, tokenizer: Any, rows: slice
) -> None:
    names = ("two", "none", "three", "none", "two")
    part, expected = (make(examples, store, tokenizer, *names, pack=pack)[rows] for pack in (120, 0))
    length = part.input_ids.shape[1]
    assert torch.equal(part.attention_mask, expected.attention_mask[:, :length])
    kept = part.attention_mask > 0
    for name in ("input_ids", "loss_weights", "image_mask"):
        assert torch.equal(part[name][kept], expected[name][:, :length][kept])
    assert volumes(part) == volumes(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_a_batch_for_a_gpu_is_the_same_one_in_pinned_memory(
    batch: Batch, examples: dict[str, Any], store: Any, tokenizer: Any
) -> None:
    pinned = make(examples, store, tokenizer, *NAMES, indices=[7, 3, 5], pin=True)
    assert all(group.voxels.is_pinned() for group in pinned.pixel_values.values())
    assert pinned.input_ids.is_pinned()
    assert torch.equal(pinned.loss_weights, batch.loss_weights)
    assert volumes(pinned) == volumes(batch)
