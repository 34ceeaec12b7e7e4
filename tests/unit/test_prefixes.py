"""Shared prefixes: the loss, gradients, positions and samples of a batch are those without sharing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.conftest import MODALITIES
from tests.unit.steps import Make, measure
from tests.unit.test_loss import assert_same
from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.data.batching import Batch, Collator
from umbrella.data.rendering import Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.data.tokenizer import number_tokens
from umbrella.models import varlen
from umbrella.models.number_loss import NumberLoss
from umbrella.training.run import check_model


class Kernel:
    """The public interface of torch's kernel for a GPU, by one product after the other."""

    def __call__(self, *inputs: Any, scale: float, window_size: tuple[int, int]) -> torch.Tensor:
        *states, query_starts, key_starts, max_queries, max_keys = inputs
        bounds = [
            tuple(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)) for starts in (query_starts, key_starts)
        ]
        assert [max(stop - start for start, stop in of) for of in bounds] == [max_queries, max_keys]
        outputs = []
        for queries, keys in zip(*bounds, strict=True):
            query, key, value = (
                x[slice(*of)].transpose(0, 1) for x, of in zip(states, (queries, keys, keys), strict=True)
            )
            behind = torch.arange(key.shape[1]) - torch.arange(key.shape[1])[-query.shape[1] :, None]
            visible = (behind <= 0) & (behind >= -window_size[0] if window_size[0] >= 0 else True)
            output = scaled_dot_product_attention(query, key, value, visible, scale=scale)
            outputs.append(output.transpose(0, 1))
        return torch.cat(outputs)


@pytest.fixture
def kernel_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", Kernel())


BY_SAMPLE = {"normalize": "sample", "task_weights": {"T3": 3.0}}


@pytest.fixture
def batch_of(cohort: dict[str, Any], talk: Make, store: Any, tokenizer: Any) -> Make:
    """Numbers of conversations to a batch: comparisons with a reference of two volumes, and others between them."""
    (f1, s1), (s2, d, f2) = ([(v.modality, v.image_path) for v in cohort[name].volumes] for name in ("two", "three"))
    first, age = [s2, "first", d], [s1, "Age?"]
    turns: list[list[Any]] = [
        *([first, "40", age, "63.5"], [[f1, s1, "Sex?"], "male."], [first, "40", [d, "Sex?"], "male.", "Age?", "7"]),
        *([first, "40", [f1, "And this one?"], "41"], ["Hi", "Hello, you."], [first, "40", age, "8"]),
        *([[s1, "first", d], "40", age, "63.5"], ["Hi", "40", age, "63.5"], ["Hi", "40", [s2, "Age?"], "64.5"]),
        [[f2], "Seen.", "Age?", "64.5"],
    ]
    renderer = Renderer(tokenizer, MODALITIES)
    examples = [
        renderer.render(talk(*zip(["user", "assistant"] * 3, of, strict=False), task_id=str(i), task_type=f"T{i % 4}"))
        for i, of in enumerate(turns)
    ]

    def make(samples: Any = range(10), mask: Any = None, **options: Any) -> Batch:
        policy = MaskPolicy(**mask or {})
        return Collator(renderer, store)([examples[i] for i in samples], policy, samples, **options)

    return make


@pytest.mark.parametrize(
    "case",
    [
        ({}, 0, "qwen2", "sdpa"),
        ({"normalize": "turn", "supervise": "all"}, 150, "llama", "sdpa"),
        (BY_SAMPLE, 10_000, "qwen2", "eager"),
        ({}, 150, "qwen2", "varlen"),
        (BY_SAMPLE, 0, "llama", "varlen"),
    ],
)
def test_shared_prefixes_have_the_loss_and_gradients_of_separate_rows(
    case: Any, build: Make, batch_of: Make, save_llava: Make, tokenizer: Any, tmp_path: Any, kernel_on_cpu: None
) -> None:
    mask, pack, language, attention = case
    save_llava(tmp_path, language=language)
    model = build(checkpoint=str(tmp_path), train="embedder+tower+projector+lora")
    model.number_loss = NumberLoss(number_tokens(tokenizer), {tokenizer.convert_tokens_to_ids(".")}, 264)
    for weight in model.parameters():
        if weight.ndim > 1:  # so large that every part has gradients far above the tolerance
            torch.nn.init.normal_(weight, std=0.3)
    separate, shared = batch_of(mask=mask), batch_of(mask=mask, pack=pack, pack_prefixes=True)
    assert shared.input_ids.count_nonzero() < separate.input_ids.count_nonzero()
    expected = measure(model, separate)
    model.use_attention(attention)
    assert_same(measure(model, shared), expected)
    assert_same(measure(model, batch_of(mask=mask, pack=pack)), expected)
    assert min(expected[0][f"train/grad_norm/{part}"] for part in ("embedder", "tower", "projector", "lora")) > 4e-3


def test_attention_by_sequences_is_refused_for_what_its_kernels_lack(
    build: Make, save_llava: Make, tmp_path: Path
) -> None:
    settings = {"model.attention": "varlen", "model.dtype": "bfloat16"}
    with pytest.raises(UserError, match=r"^model\.attention=varlen: needs a GPU; set resources\.gpus_per_worker=1"):
        check_model(load_settings(overrides=settings))
    with pytest.raises(UserError, match=r"^model: attention=varlen needs dtype=bfloat16"):
        load_settings(overrides=settings | {"model.dtype": "float32"})
    with pytest.raises(UserError, match=r"needs attention heads of a width that .* has width 12 and dropout 0\.0"):
        build(width=24, heads=2, attention="varlen", dtype="bfloat16")
    save_llava(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has width 8 and dropout 0\.1"):
        build(checkpoint=str(tmp_path), attention="varlen", dtype="bfloat16")


@pytest.mark.parametrize("window", [None, 9])
def test_rows_as_sequences_have_the_attention_of_rows_with_masks(
    batch_of: Make, kernel_on_cpu: None, window: int | None
) -> None:
    batch = batch_of([0, 2, 4, 0, 3, 5, 1], pack=150, pack_prefixes=True)
    segments, prefix, (rows, length) = batch.attention_mask, batch.prefix, batch.attention_mask.shape
    own = segments[:, :, None] == segments[:, None]
    before = (prefix[:, :, None] == segments[:, None]) & (prefix[:, :, None] > 0)
    order = own.tril().sum(-1) + before.sum(-1)
    behind = order[:, :, None] - order[:, None]
    visible = (own | before) & (behind >= 0) & (behind < (window or length))
    states: Any = [torch.randn(rows, heads, length, 8).requires_grad_() for heads in (4, 2, 2)]
    expected = scaled_dot_product_attention(*states, visible[:, None], scale=0.3, enable_gqa=True).transpose(1, 2)
    sequences = varlen.find_sequences(segments, prefix)
    module: Any = None
    found, _ = varlen.varlen_attention(module, *states, None, sequences, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    gradients = [torch.autograd.grad(output, states, grad) for output in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_each_sample_attends_to_its_prefix_and_itself_at_the_positions_it_has_alone(
    build: Make, batch_of: Make
) -> None:
    model, given, batch = build(), {}, batch_of(pack_prefixes=True)
    model.model.language_model.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    model(**batch.model_inputs())
    for i, (row, own, prefix) in enumerate(batch.places.tolist()):
        assert (prefix > 0) == (i in (0, 2, 3, 5))
        tokens = torch.isin(batch.attention_mask[row], torch.tensor([own, prefix or own]))
        seen, count = given["attention_mask"][row, 0][batch.attention_mask[row] == own], int(tokens.sum())
        assert given["position_ids"][row, tokens].tolist() == list(range(count))
        assert torch.equal(seen[:, tokens], torch.ones(count, count).tril().bool()[-len(seen) :])
        assert not seen[:, ~tokens].any()


@pytest.mark.parametrize("pack", [0, 150, 10_000])
def test_samples_of_a_batch_with_shared_prefixes_are_those_of_a_batch_without(batch_of: Make, pack: int) -> None:
    options = {"mask": BY_SAMPLE, "rng_keys": [(0, i) for i in range(10)]}
    shared, separate = batch_of(**options, pack=pack, pack_prefixes=True), batch_of(**options)
    assert pack == 0 or shared.input_ids.shape[1] <= pack
    assert shared.sample_indices.tolist() == list(range(10))  # in the order of the plan
    for key in (*range(10), slice(2, 7), slice(None, None, -1)):
        one, other = shared[key], separate[key]
        for name, value in vars(other).items():
            assert not torch.is_tensor(value) or torch.equal(getattr(one, name), value), name
        assert (one.task_ids, one.rng_keys, one.places) == (other.task_ids, other.rng_keys, None)
        assert one.pixel_values.keys() == other.pixel_values.keys()
        for name, group in one.pixel_values.items():
            mine, theirs = (g.separate().voxels[g.run.argsort()] for g in (group, other.pixel_values[name]))
            assert torch.equal(mine, theirs)


def test_a_long_group_is_in_several_rows_of_about_equal_length(batch_of: Make) -> None:
    longest = batch_of([0, 2]).input_ids.shape[1]
    batch = batch_of([0, 2] * 12, pack=5 * longest, pack_prefixes=True)
    assert [prefix.unique().tolist() for prefix in batch.prefix] == [[0, 1]] * 3
    lengths = batch.attention_mask.count_nonzero(1)
    assert int(lengths.max()) - int(lengths.min()) < longest


def test_only_the_same_turns_and_volumes_are_shared(batch_of: Make) -> None:
    header = {"supervise": "all", "turn_header": True}  # a target after the prefix, which no token of its row predicts
    for samples, mask, rng_keys, is_shared in (
        ([0, 2], {}, (), True),
        ([0, 6], {}, (), False),
        ([7, 8], {}, (), False),
        ([0, 2], header, (), False),
        ([9, 9], {}, [(0,), (0,)], True),  # the windows of a series
        ([9, 9], {}, [(0,), (1,)], False),
    ):
        batch = batch_of(samples, mask, rng_keys=rng_keys, pack_prefixes=True)
        assert (batch.places is not None) == ("prefix" in batch.model_inputs()) == is_shared
        assert len(batch.input_ids) == (1 if is_shared else 2)


def test_augmentation_with_shared_prefixes_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.pack_prefixes shares volumes, and train\.augment changes them"):
        load_settings(overrides={"data.pack_prefixes": True, "train.augment.noise": 0.1})
