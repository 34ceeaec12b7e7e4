"""Where a model comes from: made tiny, or a checkpoint whose weights are all loaded; and which of its parts move."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from umbrella.base import UserError
from umbrella.data.batching import Batch, collate
from umbrella.data.settings import MaskPolicy
from umbrella.modality import Modality
from umbrella.model.presets import build_model, parts
from umbrella.model.settings import ModelSettings
from umbrella.model.umbrella_llava import UmbrellaForConditionalGeneration as Umbrella

LAYER = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
SIGLIP = SiglipVisionConfig(**LAYER, image_size=8, patch_size=4, vision_use_head=False)
VOCABULARY = 264  # a checkpoint may have more words than its tokenizer


@pytest.fixture
def build(tokenizer: Any, modalities: dict[str, Modality]) -> Callable[..., Umbrella]:
    def build(kinds: dict[str, Modality] = modalities, **settings: Any) -> Umbrella:
        tiny = {"width": 16, "heads": 2}
        image_id = tokenizer.convert_tokens_to_ids("<image>")
        return build_model(ModelSettings(**tiny, **settings), kinds, len(tokenizer), image_id).eval()

    return build


@pytest.fixture
def batch(examples: dict[str, Any], store: Any, tokenizer: Any) -> Batch:
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    return collate(list(examples.values()), MaskPolicy(), store, image_id, tokenizer.pad_token_id)


def nll(model: Umbrella, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch.model_inputs()).token_nll


def save_llava(folder: Path, tower: PretrainedConfig = SIGLIP, **options: Any) -> LlavaForConditionalGeneration:
    """A small plain LLaVA, with the class-token strategy that is transformers' default."""
    language = Qwen2Config(**LAYER, num_key_value_heads=1, vocab_size=VOCABULARY)
    config = LlavaConfig(vision_config=tower, text_config=language, **{"vision_feature_layer": -1, **options})
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():  # no weight keeps a value that a fresh model would have too
            weight.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("train", "moving"),
    [
        ("embedder", {"embedder"}),
        ("embedder+projector", {"embedder", "projector"}),
        ("all", {"embedder", "tower", "projector", "language_model"}),
    ],
)
def test_exactly_the_named_parts_move(
    build: Callable[..., Umbrella], batch: Batch, train: Any, moving: set[str]
) -> None:
    model = build(train=train).train()
    model(**batch.model_inputs()).token_nll.sum().backward()
    norm = set(model.model.vision_tower.post_layernorm.parameters())
    for name, weights in parts(model).items():
        assert {p.grad is not None for p in weights if p not in norm} == {name in moving}, name
    assert sum(len(weights) for weights in parts(model).values()) == len(list(model.parameters()))


def test_the_norm_that_never_moves_has_no_effect(build: Callable[..., Umbrella], batch: Batch) -> None:
    model = build()
    before = nll(model, batch)
    model.model.vision_tower.post_layernorm.weight.data.normal_()
    assert torch.equal(nll(model, batch), before)


def test_a_plain_llava_keeps_every_weight_and_gets_a_fresh_embedder(
    build: Callable[..., Umbrella], batch: Batch, tmp_path: Path
) -> None:
    plain = save_llava(tmp_path / "llava").state_dict()
    model = build(checkpoint=str(tmp_path / "llava"))
    loaded = model.state_dict()
    both = plain.keys() & loaded.keys()
    assert [name for name in both if not torch.equal(plain[name], loaded[name])] == []
    flat = "model.vision_tower.embeddings."  # 2D patches and positions have no place in a volume
    assert {name for name in plain if name not in both} == {name for name in plain if name.startswith(flat)}
    assert {name for name in loaded if name not in both} == {n for n in loaded if n.startswith(f"{flat}by_modality.")}
    for embedder in model.embedder.by_modality.values():
        assert 0.5 < embedder.projection.weight.std() * embedder.projection.in_features**0.5 < 2
        assert all(0.005 < table.std() < 0.06 for table in embedder.positions)
    assert (nll(model, batch)[batch.loss_weights != 0] > 0).all()


@pytest.mark.parametrize("layer", [-1, -2, [0, 1]])
def test_every_weight_that_may_move_has_a_gradient_whichever_layer_is_read(
    build: Callable[..., Umbrella], batch: Batch, tmp_path: Path, layer: Any
) -> None:
    save_llava(tmp_path / "llava", vision_feature_layer=layer)
    model = build(checkpoint=str(tmp_path / "llava")).train()
    model(**batch.model_inputs()).token_nll.sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.requires_grad for p in model.model.vision_tower.encoder.layers[0].parameters())


def test_a_saved_model_gives_the_same_outputs(build: Callable[..., Umbrella], batch: Batch, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "saved")
    for again in (build(checkpoint=str(tmp_path / "saved")), Umbrella.from_pretrained(tmp_path / "saved").eval()):
        assert again.config.modalities == model.config.modalities
        assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
        assert torch.equal(nll(again, batch), nll(model, batch))


def test_a_modality_new_to_a_saved_model_starts_fresh_beside_the_others(
    build: Callable[..., Umbrella], modalities: dict[str, Modality], tmp_path: Path
) -> None:
    model = build({"sMRI": modalities["sMRI"]})
    model.save_pretrained(tmp_path / "saved")
    more = build(checkpoint=str(tmp_path / "saved"))
    assert torch.equal(*(m.embedder.by_modality["sMRI"].projection.weight for m in (model, more)))
    assert all(0.005 < table.std() < 0.06 for table in more.embedder.by_modality["fMRI"].positions)


def test_a_saved_model_of_another_grid_names_the_weight_that_differs(
    build: Callable[..., Umbrella], tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path / "saved")
    other = {"sMRI": Modality(grid=(8, 4, 4), patch=(2, 4, 4))}
    with pytest.raises(UserError, match=r"sMRI\.positions\.0 is \(2, 16\) there and \(4, 16\) here"):
        build(other, checkpoint=str(tmp_path / "saved"))


def test_a_checkpoint_that_cannot_be_used_says_why(build: Callable[..., Umbrella], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.checkpoint=/no/such/folder: cannot be loaded: "):
        build(checkpoint="/no/such/folder")
    Qwen2Config(**LAYER).save_pretrained(tmp_path / "qwen")
    with pytest.raises(UserError, match="is a qwen2, not a LLaVA"):
        build(checkpoint=str(tmp_path / "qwen"))
    save_llava(tmp_path / "clip", CLIPVisionConfig(**LAYER, image_size=8, patch_size=4))
    with pytest.raises(UserError, match="its tower is clip_vision_model; siglip_vision_model works"):
        build(checkpoint=str(tmp_path / "clip"))
