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
from umbrella.model.presets import build_model
from umbrella.model.settings import ModelSettings
from umbrella.model.umbrella_llava import UmbrellaForConditionalGeneration as Umbrella

MakeBatch = Callable[..., Batch]


@pytest.fixture
def model(tokenizer: Any, modalities: dict[str, Modality]) -> Umbrella:
    torch.manual_seed(0)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    return build_model(ModelSettings(width=16, heads=2), modalities, len(tokenizer), image_id).eval()


@pytest.fixture
def make(examples: dict[str, Any], store: Any, tokenizer: Any) -> MakeBatch:
    def make(*names: str, supervise: Any = "assistant") -> Batch:
        rows = [examples[name] for name in names]
        policy = MaskPolicy(supervise=supervise)
        return collate(rows, policy, store, tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id)

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
        torch.testing.assert_close(model.features(batch.input_ids, groups), torch.cat(alone))


def test_volumes_that_do_not_fit_the_placeholders_name_both_counts(model: Umbrella, make: MakeBatch) -> None:
    batch = make("two", "three")
    groups = batch.pixel_values
    lacking = {name: group for name, group in groups.items() if name != "dMRI"}
    with pytest.raises(ValueError, match="4 volumes for 5 runs of placeholders"):
        nll(model, replace(batch, pixel_values=lacking))
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
