"""The model: the right likelihoods, the right volume at the right place, and the right weights moving."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from umbrella.data.batching import Batch, VolumeGroup, collate
from umbrella.data.settings import MaskPolicy
from umbrella.modality import Modality
from umbrella.models.build import build_model
from umbrella.models.settings import ModelSettings
from umbrella.models.token_nll import token_nll
from umbrella.models.umbrella_llava import UmbrellaForConditionalGeneration as Umbrella
from umbrella.models.umbrella_llava import packed_position_ids

MakeBatch = Callable[..., Batch]


@pytest.fixture
def model(tokenizer: Any, modalities: dict[str, Modality]) -> Umbrella:
    torch.manual_seed(0)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    return build_model(ModelSettings(width=16, heads=2), modalities, len(tokenizer), image_id).eval()


@pytest.fixture
def make(examples: dict[str, Any], store: Any, tokenizer: Any) -> MakeBatch:
    def make(*names: str, supervise: Any = "assistant", **options: Any) -> Batch:
        rows = [examples[name] for name in names]
        policy, image_id = MaskPolicy(supervise=supervise), tokenizer.convert_tokens_to_ids("<image>")
        return collate(rows, policy, store, image_id, tokenizer.pad_token_id, **options)

    return make


def nll(model: Umbrella, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch.model_inputs()).token_nll


def test_token_nll_is_the_cross_entropy_of_the_full_logits(model: Umbrella, make: MakeBatch) -> None:
    batch = make("two", "none", "three", supervise="all")
    with torch.no_grad():
        logits = model(batch.input_ids, batch.attention_mask, batch.pixel_values).logits
    # Position t's logits speak of token t + 1.
    plain = functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch.labels[:, 1:], reduction="none")
    torch.testing.assert_close(nll(model, batch)[:, 1:], plain, rtol=1e-5, atol=1e-5)
    assert (nll(model, batch)[batch.loss_weights == 0] == 0).all()
    assert (nll(model, batch)[batch.loss_weights != 0] > 0).all()


@pytest.mark.parametrize("moving", ["hidden and words", "hidden", "words"])
@pytest.mark.parametrize("max_logits", [1, 260 * 5, 260 * 1000])
def test_logits_a_few_at_a_time_give_the_same_likelihoods_and_gradients(max_logits: int, moving: str) -> None:
    torch.manual_seed(0)
    hidden, words = torch.randn(2, 9, 8), torch.randn(260, 8)
    wanted = [{"hidden": hidden, "words": words}[name].requires_grad_() for name in moving.split(" and ")]
    ids, weights = torch.randint(260, (2, 9)), torch.randint(2, (2, 9)) * torch.rand(2, 9)
    plain = functional.cross_entropy((hidden @ words.T)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    found = token_nll(hidden, words, ids, weights, max_logits)
    torch.testing.assert_close(found[:, 1:], plain * (weights[:, 1:] != 0), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad((plain * weights[:, 1:]).sum(), wanted)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), wanted), expected)


def test_likelihoods_are_float32_whatever_the_rest_is_computed_in() -> None:
    torch.manual_seed(0)
    hidden, words, ids = torch.randn(1, 5, 8).bfloat16(), torch.randn(260, 8), torch.randint(260, (1, 5))
    with torch.autocast("cpu", torch.bfloat16):
        found = token_nll(hidden, words, ids, torch.ones(1, 5))
    exact = functional.cross_entropy((hidden.float() @ words.T)[0, :-1], ids[0, 1:], reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, 1:], exact)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sample_in_a_shared_row_is_as_likely_as_alone(model: Umbrella, make: MakeBatch, attention: str) -> None:
    model.set_attn_implementation({"text_config": attention})
    names = ("two", "none", "three", "none")
    shared = make(*names, pack=130)
    assert [row.unique().tolist() for row in shared.attention_mask] == [[0, 1, 2], [1, 2]]
    rows = nll(model, shared)
    places = [(row, number) for row in range(2) for number in (1, 2)]
    for name, (row, number) in zip(names, places, strict=True):
        alone = nll(model, make(name))[0]
        torch.testing.assert_close(rows[row][shared.attention_mask[row] == number], alone, rtol=0, atol=1e-5)


def test_positions_start_anew_with_each_sample_of_a_row() -> None:
    mask = torch.tensor([[1, 1, 1, 2, 3, 3], [1, 2, 2, 0, 0, 0]])
    assert packed_position_ids(mask).tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 0, 1, 2]]


def test_a_row_in_a_mixed_batch_is_as_likely_as_alone(model: Umbrella, make: MakeBatch) -> None:
    names = ("two", "none", "three", "two")
    together = nll(model, make(*names))
    for row, name in enumerate(names):
        alone = nll(model, make(name))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=0, atol=1e-5)
        assert (together[row, len(alone) :] == 0).all()


def test_padding_on_the_left_is_not_attended_to_either(model: Umbrella, make: MakeBatch) -> None:
    batch = make("two")
    padded = {name: functional.pad(batch[name], (5, 0)) for name in ("input_ids", "attention_mask", "loss_weights")}
    torch.testing.assert_close(nll(model, replace(batch, **padded))[:, 5:], nll(model, batch), rtol=0, atol=1e-5)


def test_a_slice_of_a_batch_is_as_likely_as_in_it(model: Umbrella, make: MakeBatch) -> None:
    batch = make("two", "none", "three")
    torch.testing.assert_close(nll(model, batch[::-1]), nll(model, batch).flip(0), rtol=0, atol=1e-5)


def test_the_order_of_modalities_and_of_their_volumes_does_not_matter(model: Umbrella, make: MakeBatch) -> None:
    batch = make("two", "three")
    backwards = {
        name: VolumeGroup(group.voxels.flip(0), group.run.flip(0))
        for name, group in reversed(batch.pixel_values.items())
    }
    assert list(backwards) != list(batch.pixel_values)
    torch.testing.assert_close(nll(model, replace(batch, pixel_values=backwards)), nll(model, batch))


def test_two_volumes_that_change_places_change_the_result(model: Umbrella, make: MakeBatch) -> None:
    batch = make("two", "three")
    group = batch.pixel_values["sMRI"]
    swapped = batch.pixel_values | {"sMRI": VolumeGroup(group.voxels.flip(0), group.run)}
    difference = nll(model, replace(batch, pixel_values=swapped)) - nll(model, batch)
    assert (difference.abs().amax(1) > 1e-5).all()


def test_features_stand_at_the_placeholders_in_reading_order(model: Umbrella, make: MakeBatch) -> None:
    batch = make("two", "three")
    groups = batch.pixel_values
    order = [("fMRI", 0), ("sMRI", 0), ("sMRI", 1), ("dMRI", 0), ("fMRI", 1)]
    with torch.no_grad():
        alone = [
            model.model.get_image_features((name, groups[name].voxels[i : i + 1])).pooler_output[0] for name, i in order
        ]
        torch.testing.assert_close(model.embed_inputs(batch.input_ids, groups)[batch.image_mask], torch.cat(alone))


def test_volumes_that_do_not_fit_the_placeholders_name_both_counts(model: Umbrella, make: MakeBatch) -> None:
    batch = make("two", "three")
    groups = batch.pixel_values
    lacking = {name: group for name, group in groups.items() if name != "dMRI"}
    with pytest.raises(ValueError, match="4 volumes for 5 runs of placeholders in the batch; row 1, run 3 of the"):
        nll(model, replace(batch, pixel_values=lacking))
    with pytest.raises(ValueError, match="0 volumes for 5 runs of placeholders in the batch; row 0, run 0 of the"):
        nll(model, replace(batch, pixel_values={}))
    with pytest.raises(ValueError, match="0 volumes for 5 runs"):
        model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=2)
    shifted = groups | {"dMRI": replace(groups["dMRI"], run=torch.tensor([7]))}
    with pytest.raises(ValueError, match="5 volumes for 5 runs of placeholders in the batch; row 1, run 3"):
        nll(model, replace(batch, pixel_values=shifted))
    # Both totals still agree: opposite errors in two rows must not cancel.
    exchanged = groups | {"fMRI": replace(groups["fMRI"], run=torch.tensor([1, 4]))}
    exchanged["sMRI"] = replace(groups["sMRI"], run=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="row 0, run 0 of the batch: 3 placeholders for a volume of 2 tokens"):
        nll(model, replace(batch, pixel_values=exchanged))


@pytest.mark.parametrize(("name", "absent"), [("two", ["dMRI"]), ("none", ["sMRI", "dMRI", "fMRI"])])
def test_weights_that_a_batch_leaves_out_have_gradients_of_zero(
    model: Umbrella, make: MakeBatch, name: str, absent: list[str]
) -> None:
    model.train()
    model(**make(name).model_inputs()).token_nll.sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    for modality, embedder in model.embedder.by_modality.items():
        assert all((p.grad == 0).all() for p in embedder.parameters()) == (modality in absent)


def test_generation_reads_the_volumes_and_is_the_same_each_time(model: Umbrella, make: MakeBatch) -> None:
    batch = make("two")
    prompt = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    length = batch.input_ids.shape[1]

    def generate(volumes: Any) -> torch.Tensor:
        return model.generate(
            **prompt, pixel_values=volumes, max_new_tokens=4, do_sample=False, output_logits=True,
            return_dict_in_generate=True, eos_token_id=None,
        )  # fmt: skip

    first = generate(batch.pixel_values)
    assert torch.equal(first.sequences, generate(batch.pixel_values).sequences)
    with torch.no_grad():  # each step with its cache says what one pass over the whole says
        whole = model(first.sequences, torch.ones_like(first.sequences), batch.pixel_values).logits
    torch.testing.assert_close(torch.stack(first.logits, 1), whole[:, length - 1 : -1], rtol=0, atol=1e-5)
    other = {name: replace(group, voxels=-group.voxels) for name, group in batch.pixel_values.items()}
    assert not torch.allclose(generate(other).logits[0], first.logits[0], atol=1e-5)


def test_prompts_of_unequal_lengths_padded_on_the_left_are_answered_as_one_by_one(
    model: Umbrella, make: MakeBatch
) -> None:
    names, new = ("none", "two", "three"), 5
    batch = make(*names)
    length = batch.input_ids.shape[1]
    missing = (length - batch.attention_mask.sum(1)).tolist()
    assert sorted(missing) == [0, 29, 35]
    left = {
        name: torch.stack([row.roll(n) for row, n in zip(batch[name], missing, strict=True)])
        for name in ("input_ids", "attention_mask")
    }
    options = {"max_new_tokens": new, "eos_token_id": None, "pad_token_id": 256}
    together = model.generate(**left, pixel_values=batch.pixel_values, **options)[:, length:]
    for answer, name in zip(together, names, strict=True):
        one = make(name)
        prompt = {"input_ids": one.input_ids, "attention_mask": one.attention_mask}
        alone = model.generate(**prompt, pixel_values=one.pixel_values, **options)
        assert answer.tolist() == alone[0, -new:].tolist()


def test_generation_is_greedy_unless_told_otherwise_and_gives_one_answer_a_row(
    model: Umbrella, make: MakeBatch
) -> None:
    batch = make("two")
    prompt = {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values, "max_new_tokens": 3}
    with torch.no_grad():
        likeliest = model(batch.input_ids, None, batch.pixel_values).logits[0, -1].argmax()
    assert model.generate(**prompt, eos_token_id=None)[0, -3] == likeliest
    drawn = {tuple(model.generate(**prompt, do_sample=True, eos_token_id=None)[0, -3:].tolist()) for _ in range(4)}
    assert len(drawn) > 1
    with pytest.raises(ValueError, match="num_beams and num_return_sequences stay at 1"):
        model.generate(**prompt, num_beams=2)


@pytest.mark.parametrize(("tower", "language"), [("clip", "llama"), ("siglip", "qwen2")])
def test_packing_and_batched_generation_hold_for_every_tower_and_language_model(
    make: MakeBatch,
    save_llava: Callable[..., Any],
    modalities: dict[str, Modality],
    tmp_path: Any,
    tower: str,
    language: str,
) -> None:
    save_llava(tmp_path, tower, language, vision_feature_select_strategy="default" if tower == "clip" else "full")
    image_id = make("two").input_ids[make("two").image_mask][0].item()
    model = build_model(ModelSettings(checkpoint=str(tmp_path)), modalities, 260, image_id).eval()
    shared, padded = make("two", "none", "three", pack=10_000), make("two", "none", "three")
    alone = nll(model, padded)[padded.attention_mask > 0]
    torch.testing.assert_close(nll(model, shared)[0], alone, rtol=0, atol=1e-5)
    for cache in ("dynamic", "static"):
        options = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 256, "cache_implementation": cache}
        one = make("three")
        answer = model.generate(input_ids=one.input_ids, pixel_values=one.pixel_values, **options)[0, -4:]
        with torch.no_grad():
            again = torch.cat([one.input_ids, answer[None, :-1]], 1)
            likeliest = model(again, torch.ones_like(again), one.pixel_values).logits[0, -4:].argmax(-1)
        assert answer.tolist() == likeliest.tolist()
