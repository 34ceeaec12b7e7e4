"""The model: exact likelihoods, volumes at their placeholders, gradients of unused weights, and generation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.conftest import nll
from umbrella.data.batching import Batch, VolumeGroup
from umbrella.models.token_nll import token_nll
from umbrella.models.umbrella_llava import UmbrellaForConditionalGeneration as Umbrella

BatchOf = Callable[..., Batch]
close = torch.testing.assert_close


@pytest.fixture
def model(build: Callable[..., Umbrella]) -> Umbrella:
    return build().eval()


def test_token_nll_is_the_cross_entropy_of_the_full_logits(model: Umbrella, batch_of: BatchOf) -> None:
    batch = batch_of("two", "none", "three", supervise="all")
    with torch.no_grad():
        logits = model(batch.input_ids, batch.attention_mask, batch.pixel_values).logits
    # The logits of position t predict token t + 1.
    plain = functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch.labels[:, 1:], reduction="none")
    found = nll(model, batch)
    close(found[:, 1:], plain, rtol=1e-5, atol=1e-5)
    assert ((found > 0) == (batch.loss_weights != 0)).all()


@pytest.mark.parametrize("trainable", ["hidden and words", "hidden", "words"])
@pytest.mark.parametrize("max_logits", [1, 260 * 5])
def test_logits_in_chunks_give_the_same_likelihoods_and_gradients(max_logits: int, trainable: str) -> None:
    torch.manual_seed(0)
    hidden, words = torch.randn(2, 9, 8), torch.randn(260, 8)
    wanted = [{"hidden": hidden, "words": words}[name].requires_grad_() for name in trainable.split(" and ")]
    ids, weights = torch.randint(260, (2, 9)), torch.randint(2, (2, 9)) * torch.rand(2, 9)
    plain = functional.cross_entropy((hidden @ words.T)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    found = token_nll(hidden, words, ids, weights, max_logits)
    close(found[:, 1:], plain * (weights[:, 1:] != 0), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad((plain * weights[:, 1:]).sum(), wanted)
    close(torch.autograd.grad((found * weights).sum(), wanted), expected)


def test_token_nll_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    hidden, words, ids = torch.randn(1, 5, 8).bfloat16(), torch.randn(260, 8), torch.randint(260, (1, 5))
    with torch.autocast("cpu", torch.bfloat16):
        found = token_nll(hidden, words, ids, torch.ones(1, 5))
    exact = functional.cross_entropy((hidden.float() @ words.T)[0, :-1], ids[0, 1:], reduction="none")
    assert found.dtype == torch.float32
    close(found[0, 1:], exact)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sample_is_as_likely_as_alone(model: Umbrella, batch_of: BatchOf, attention: str) -> None:
    model.use_attention(attention)
    names = ("two", "none", "three", "none")
    packed = batch_of(*names, pack=130)
    assert [row.unique().tolist() for row in packed.attention_mask] == [[0, 1, 2], [1, 2]]
    rows = nll(model, packed)
    places = [(row, number) for row in range(2) for number in (1, 2)]
    for name, (row, number) in zip(names, places, strict=True):
        alone = nll(model, batch_of(name))[0]
        close(rows[row][packed.attention_mask[row] == number], alone, rtol=0, atol=1e-5)


def test_row_of_a_mixed_batch_is_as_likely_as_alone(model: Umbrella, batch_of: BatchOf) -> None:
    names = ("two", "none", "three", "two")
    rows = nll(model, batch_of(*names))
    for row, name in zip(rows, names, strict=True):
        alone = nll(model, batch_of(name))[0]
        close(row[: len(alone)], alone, rtol=0, atol=1e-5)
        assert (row[len(alone) :] == 0).all()


def test_padding_on_the_left_is_not_attended_to(model: Umbrella, batch_of: BatchOf) -> None:
    batch = batch_of("two")
    padded = {
        name: functional.pad(getattr(batch, name), (5, 0)) for name in ("input_ids", "attention_mask", "loss_weights")
    }
    close(nll(model, replace(batch, **padded))[:, 5:], nll(model, batch), rtol=0, atol=1e-5)


def test_features_are_at_the_placeholders_of_their_run_in_any_order_of_the_groups(
    model: Umbrella, batch_of: BatchOf
) -> None:
    batch = batch_of("two", "three")
    groups = batch.pixel_values
    order = [("fMRI", 0), ("sMRI", 0), ("sMRI", 1), ("dMRI", 0), ("fMRI", 1)]
    reverse = {name: VolumeGroup(group.voxels.flip(0), group.run.flip(0)) for name, group in reversed(groups.items())}
    with torch.no_grad():
        alone = [
            model.model.get_image_features((name, groups[name].voxels[i : i + 1])).pooler_output[0] for name, i in order
        ]
        for volumes in (groups, reverse):
            close(model.embed_inputs(batch.input_ids, volumes)[batch.image_mask], torch.cat(alone))


def test_a_volume_that_occurs_several_times_is_computed_once_with_equal_loss_and_gradients(
    model: Umbrella, batch_of: BatchOf
) -> None:
    batch = batch_of("two", "three", "two")
    assert [group.index is None for group in batch.pixel_values.values()] == [False, False, True]
    separate = replace(batch, pixel_values={name: group.separate() for name, group in batch.pixel_values.items()})
    assert len(separate.pixel_values["sMRI"].voxels) == len(batch.pixel_values["sMRI"].voxels) + 1
    model.train()
    results = []
    for one in (batch, separate):
        model.zero_grad()
        loss = (model(**one.model_inputs()).token_nll * one.loss_weights).sum()
        loss.backward()
        results.append([loss, *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    for shared, own in zip(*results, strict=True):
        close(shared, own, rtol=1e-5, atol=1e-5)
    for i in range(len(batch)):
        for name, group in batch[i].pixel_values.items():
            close(group.separate().voxels, separate[i].pixel_values[name].voxels, rtol=0, atol=0)


def test_volumes_that_do_not_fit_the_placeholders_are_an_error_with_both_counts(
    model: Umbrella, batch_of: BatchOf
) -> None:
    batch = batch_of("two", "three")
    groups = batch.pixel_values
    lacking = {name: group for name, group in groups.items() if name != "dMRI"}
    shifted = groups | {"dMRI": replace(groups["dMRI"], run=torch.tensor([7]))}
    # Both totals agree: opposite errors in two rows must not cancel.
    exchanged = groups | {"fMRI": replace(groups["fMRI"], run=torch.tensor([1, 4]))}
    exchanged["sMRI"] = replace(groups["sMRI"], run=torch.tensor([0, 2]))
    for volumes, message in [
        (lacking, "4 volumes for 5 runs of placeholders in the batch; row 1, run 3 of the"),
        ({}, "0 volumes for 5 runs of placeholders in the batch; row 0, run 0 of the"),
        (shifted, "5 volumes for 5 runs of placeholders in the batch; row 1, run 3"),
        (exchanged, "row 0, run 0 of the batch: 3 placeholders for a volume of 2 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            nll(model, replace(batch, pixel_values=volumes))
    with pytest.raises(ValueError, match="0 volumes for 5 runs"):
        model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=2)


@pytest.mark.parametrize(("name", "absent"), [("two", ["dMRI"]), ("none", ["sMRI", "dMRI", "fMRI"])])
def test_weights_that_a_batch_does_not_use_have_gradients_of_zero(
    model: Umbrella, batch_of: BatchOf, name: str, absent: list[str]
) -> None:
    model.train()
    model(**batch_of(name).model_inputs()).token_nll.sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    for modality, embedder in model.embedder.by_modality.items():
        assert all((p.grad == 0).all() for p in embedder.parameters()) == (modality in absent)


def test_generation_reads_the_volumes_and_each_cached_step_equals_one_full_pass(
    model: Umbrella, batch_of: BatchOf
) -> None:
    batch = batch_of("two")
    prompt = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    length = batch.input_ids.shape[1]

    def generate(volumes: Any) -> Any:
        options = {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
        return model.generate(**prompt, pixel_values=volumes, max_new_tokens=4, **options)

    first = generate(batch.pixel_values)
    with torch.no_grad():
        whole = model(first.sequences, torch.ones_like(first.sequences), batch.pixel_values).logits
    close(torch.stack(first.logits, 1), whole[:, length - 1 : -1], rtol=0, atol=1e-5)
    assert first.sequences[0, length:].tolist() == whole[0, length - 1 : -1].argmax(-1).tolist(), "greedy"
    other = {name: replace(group, voxels=-group.voxels) for name, group in batch.pixel_values.items()}
    assert not torch.allclose(generate(other).logits[0], first.logits[0], atol=1e-5)


def test_left_padded_prompts_are_answered_as_one_by_one(model: Umbrella, batch_of: BatchOf) -> None:
    names, new = ("none", "two", "three"), 5
    batch = batch_of(*names)
    length = batch.input_ids.shape[1]
    missing = (length - batch.attention_mask.sum(1)).tolist()
    assert sorted(missing) == [0, 29, 35]
    left = {
        name: torch.stack([row.roll(n) for row, n in zip(batch.model_inputs()[name], missing, strict=True)])
        for name in ("input_ids", "attention_mask")
    }
    options = {"max_new_tokens": new, "eos_token_id": None, "pad_token_id": 256}
    together = model.generate(**left, pixel_values=batch.pixel_values, **options)[:, length:]
    for answer, name in zip(together, names, strict=True):
        one = batch_of(name)
        prompt = {"input_ids": one.input_ids, "attention_mask": one.attention_mask}
        alone = model.generate(**prompt, pixel_values=one.pixel_values, **options)
        assert answer.tolist() == alone[0, -new:].tolist()


def test_generation_samples_if_asked_and_refuses_several_answers_per_row(model: Umbrella, batch_of: BatchOf) -> None:
    batch = batch_of("two")
    prompt = {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values, "max_new_tokens": 3}
    drawn = {tuple(model.generate(**prompt, do_sample=True, eos_token_id=None)[0, -3:].tolist()) for _ in range(4)}
    assert len(drawn) > 1
    with pytest.raises(ValueError, match="num_beams and num_return_sequences stay at 1"):
        model.generate(**prompt, num_beams=2)


def test_packing_and_generation_hold_for_clip_and_llama(
    build: Callable[..., Umbrella], batch_of: BatchOf, save_llava: Callable[..., Any], tmp_path: Path
) -> None:
    save_llava(tmp_path, "clip", "llama", vision_feature_select_strategy="default")
    model = build(checkpoint=str(tmp_path)).eval()
    packed, padded = batch_of("two", "none", "three", pack=10_000), batch_of("two", "none", "three")
    alone = nll(model, padded)[padded.attention_mask > 0]
    close(nll(model, packed)[0], alone, rtol=0, atol=1e-5)
    one = batch_of("three")
    for cache in ("dynamic", "static"):
        options = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 256, "cache_implementation": cache}
        answer = model.generate(input_ids=one.input_ids, pixel_values=one.pixel_values, **options)[0, -4:]
        with torch.no_grad():
            again = torch.cat([one.input_ids, answer[None, :-1]], 1)
            likeliest = model(again, torch.ones_like(again), one.pixel_values).logits[0, -4:].argmax(-1)
        assert answer.tolist() == likeliest.tolist()
