"""Where a model comes from: made tiny, or a checkpoint whose weights are all loaded; and which of its parts move."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DINOv3ViTConfig,
    GenerationConfig,
    LlavaConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.data.batching import Batch, collate
from umbrella.data.rendering import load_renderer
from umbrella.data.settings import MaskPolicy
from umbrella.modality import Modality
from umbrella.models.build import build_model
from umbrella.models.settings import ModelSettings
from umbrella.models.trainable_parameters import component_parameters
from umbrella.models.umbrella_llava import UmbrellaForConditionalGeneration as Umbrella


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
    """Each token's negative log-likelihood, with the weights in memory of torch's own alignment.

    Loaded weights lie in a mapped file, and on some processors matrix products round by alignment.
    """
    for weight in model.parameters():
        weight.data = weight.data.clone()
    with torch.no_grad():
        return model(**batch.model_inputs()).token_nll


@pytest.mark.parametrize(
    ("train", "moving"),
    [
        ("embedder", {"embedder"}),
        ("embedder+projector", {"embedder", "projector"}),
        ("embedder+projector+tower", {"embedder", "projector", "tower"}),
        ("embedder+lora", {"embedder", "lora"}),
        ("lora", {"lora"}),
        ("all", {"embedder", "tower", "projector", "language_model"}),
    ],
)
def test_exactly_the_named_parts_move(
    build: Callable[..., Umbrella], batch: Batch, train: Any, moving: set[str]
) -> None:
    model = build(train=train).train()
    model(**batch.model_inputs()).token_nll.sum().backward()
    norm = set(model.model.vision_tower.post_layernorm.parameters())
    for name, weights in component_parameters(model).items():
        assert {p.grad is not None for p in weights if p not in norm} == {name in moving}, name
    assert sum(len(weights) for weights in component_parameters(model).values()) == len(list(model.parameters()))


def test_the_norm_that_never_moves_has_no_effect(build: Callable[..., Umbrella], batch: Batch) -> None:
    model = build()
    before = nll(model, batch)
    model.model.vision_tower.post_layernorm.weight.data.normal_()
    assert torch.equal(nll(model, batch), before)


@pytest.mark.parametrize("language", ["qwen2", "llama"])
@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_a_plain_llava_keeps_every_weight_and_gets_a_fresh_embedder(
    build: Callable[..., Umbrella],
    save_llava: Callable[..., Any],
    batch: Batch,
    tmp_path: Path,
    tower: str,
    language: str,
) -> None:
    plain = save_llava(tmp_path / "llava", tower, language).state_dict()
    model = build(checkpoint=str(tmp_path / "llava"))
    loaded = model.state_dict()
    flat = "model.vision_tower.embeddings."  # 2D patches and positions have no place in a volume
    kept = {name for name in plain if not name.startswith(flat)}
    assert [name for name in kept if not torch.equal(plain[name], loaded[name])] == []
    fresh = {name for name in loaded if name not in kept}
    assert all(n.startswith(f"{flat}by_modality.") or n == f"{flat}class_embedding" for n in fresh)
    for embedder in model.embedder.by_modality.values():
        assert 0.5 < embedder.projection.weight.std() * embedder.projection.in_features**0.5 < 2
        assert all(0.005 < table.std() < 0.06 for table in embedder.positions)
    if tower == "clip":
        whole = plain[f"{flat}class_embedding"] + plain[f"{flat}position_embedding.weight"][0]
        assert torch.equal(model.embedder.class_embedding, whole)
    assert (nll(model, batch)[batch.loss_weights != 0] > 0).all()


@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize("layer", [-1, -2, [0, 1]])
def test_every_weight_that_may_move_has_a_gradient_whichever_layer_is_read(
    build: Callable[..., Umbrella],
    save_llava: Callable[..., Any],
    batch: Batch,
    tmp_path: Path,
    layer: Any,
    tower: str,
) -> None:
    save_llava(tmp_path / "llava", tower, vision_feature_layer=layer)
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


def test_a_saved_model_read_on_another_grid_has_its_positions_interpolated(
    build: Callable[..., Umbrella], tmp_path: Path
) -> None:
    model = build()
    model.save_pretrained(tmp_path / "saved")
    wider = {"sMRI": Modality(grid=(8, 8, 4), patch=(2, 4, 4))}
    again = build(wider, checkpoint=str(tmp_path / "saved"))
    before, after = (m.embedder.by_modality["sMRI"] for m in (model, again))
    assert torch.equal(before.projection.weight, after.projection.weight)
    two, four = before.positions[0], after.positions[0]
    expected = torch.stack([two[0], 0.75 * two[0] + 0.25 * two[1], 0.25 * two[0] + 0.75 * two[1], two[1]])
    torch.testing.assert_close(four, expected)
    assert [len(table) for table in after.positions] == [4, 2, 1]
    assert (again.config.modalities, list(again.embedder.by_modality)) == (wider, ["sMRI"])


def test_a_saved_model_of_other_patches_says_what_differs(build: Callable[..., Umbrella], tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "saved")
    other = {"sMRI": Modality(grid=(4, 4, 4), patch=(2, 2, 2))}
    with pytest.raises(UserError, match=r"reads sMRI in patches of 2x4x4, and modalities\.sMRI\.patch is 2x2x2; take"):
        build(other, checkpoint=str(tmp_path / "saved"))
    pet = {"PET": Modality(grid=(4, 4, 4), patch=(2, 2, 2))}
    with pytest.raises(UserError, match="has no embedder for PET, and no 2D weights to inflate one from"):
        build(pet, checkpoint=str(tmp_path / "saved"), embedder_init="inflated")


def test_a_checkpoint_that_cannot_be_used_says_why(
    build: Callable[..., Umbrella], save_llava: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^model\.checkpoint=/no/such/folder: cannot be loaded: "):
        build(checkpoint="/no/such/folder")
    layer = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    Qwen2Config(**layer).save_pretrained(tmp_path / "qwen")
    with pytest.raises(UserError, match="is a qwen2; llava, llava_next, llava_onevision, umbrella_llava work"):
        build(checkpoint=str(tmp_path / "qwen"))
    siglip, qwen = SiglipVisionConfig(**layer), Qwen2Config(**layer)
    LlavaConfig(vision_config=siglip, text_config=MistralConfig(**layer)).save_pretrained(tmp_path / "mistral")
    with pytest.raises(UserError, match="its language model is mistral; qwen2 and llama work"):
        build(checkpoint=str(tmp_path / "mistral"))
    LlavaConfig(vision_config=DINOv3ViTConfig(**layer), text_config=qwen).save_pretrained(tmp_path / "dino")
    with pytest.raises(UserError, match="its tower is dinov3_vit; siglip_vision_model and clip_vision_model work"):
        build(checkpoint=str(tmp_path / "dino"))
    weights = save_llava(tmp_path / "half").state_dict()
    save_file({n: w for n, w in weights.items() if "projector" not in n}, tmp_path / "half" / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 4 weights, model\.multi_modal_projector\.linear_1\.bias among them"):
        build(checkpoint=str(tmp_path / "half"))


def test_a_checkpoint_of_pickles_is_not_read(
    build: Callable[..., Umbrella], save_llava: Callable[..., Any], tmp_path: Path
) -> None:
    weights = save_llava(tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot be loaded: .*model\.safetensors"):
        build(checkpoint=str(tmp_path))
    build().save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "model.safetensors").rename(tmp_path / "ours" / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        Umbrella.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "part", ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
def test_code_that_comes_with_a_checkpoint_is_neither_run_nor_offered(
    save_llava: Callable[..., Any],
    tokenizer: Any,
    modalities: dict[str, Modality],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    known: bool,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    save_llava(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    file = tmp_path / part
    content = json.loads(file.read_text()) if file.exists() else {}
    kinds = ("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoModelForImageTextToText")
    classes = dict.fromkeys(kinds, "code.Own") | {"AutoTokenizer": ["code.Own", "code.Own"]}
    own_kind = {} if known else {"model_type": "own", "tokenizer_class": "Own", "processor_class": "Own"}
    file.write_text(json.dumps(content | own_kind | {"auto_map": classes}))
    settings = load_settings(overrides={"model.checkpoint": str(tmp_path)})
    if part == "tokenizer_config.json" and not known:
        (tmp_path / "config.json").unlink()  # it would tell which of the known tokenizers to take
    reason = ""
    try:
        renderer = load_renderer(settings)
        build_model(settings.model, modalities, len(renderer.tokenizer), renderer.image_id)
    except UserError as error:
        reason = str(error)
    refused = not known and part in ("config.json", "tokenizer_config.json")
    assert re.fullmatch("model.checkpoint=.* it needs Python code that comes with it, .*" if refused else "", reason)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_was_cut_short_says_so(
    build: Callable[..., Umbrella], save_llava: Callable[..., Any], tmp_path: Path
) -> None:
    save_llava(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"^model\.checkpoint=.*: cannot be loaded: "):
        build(checkpoint=str(tmp_path))


def test_a_plain_llava_is_not_taken_for_a_saved_model(save_llava: Callable[..., Any], tmp_path: Path) -> None:
    save_llava(tmp_path)
    with pytest.raises(ValueError, match=r"is a llava without volume embedders; umbrella\.models\.build\.build_model"):
        Umbrella.from_pretrained(tmp_path)


def test_a_placeholder_that_the_model_has_no_word_for_is_refused(
    save_llava: Callable[..., Any], modalities: dict[str, Modality], tmp_path: Path
) -> None:
    save_llava(tmp_path)
    with pytest.raises(UserError, match="its tokenizer's placeholder is token 350, and its model has 264 tokens"):
        build_model(ModelSettings(checkpoint=str(tmp_path)), modalities, 351, 350)


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_relatives_of_llava_are_taken_over_as_well(
    build: Callable[..., Umbrella], batch: Batch, tmp_path: Path, kind: str
) -> None:
    layer = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    parts_of = {
        "vision_config": SiglipVisionConfig(**layer, image_size=8, patch_size=4, vision_use_head=False),
        "text_config": Qwen2Config(**layer, num_key_value_heads=1, vocab_size=264),
        "vision_feature_layer": -1,
    }
    plain = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **parts_of))
    plain.save_pretrained(tmp_path / kind)
    model = build(checkpoint=str(tmp_path / kind), embedder_init="inflated")
    for part in ("vision_tower.encoder", "multi_modal_projector", "language_model"):
        theirs, ours = (m.model.get_submodule(part).state_dict() for m in (plain, model))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(nll(build(checkpoint=str(tmp_path / "saved")), batch), nll(model, batch))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_language_model_attends_as_the_settings_say(
    build: Callable[..., Umbrella], save_llava: Callable[..., Any], tmp_path: Path, checkpoint: bool
) -> None:
    save_llava(tmp_path)
    model = build(attention="eager", checkpoint=str(tmp_path) if checkpoint else "")
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_a_checkpoints_own_way_of_generating_does_not_act(
    build: Callable[..., Umbrella], save_llava: Callable[..., Any], tmp_path: Path
) -> None:
    save_llava(tmp_path)
    way = GenerationConfig(do_sample=True, temperature=2.0, num_beams=3, repetition_penalty=1.5, eos_token_id=7)
    way.save_pretrained(tmp_path)
    own = build(checkpoint=str(tmp_path)).generation_config
    assert (own.do_sample, own.num_beams, own.repetition_penalty, own.temperature) == (None, None, None, None)
    assert own.eos_token_id == 7


def test_a_relative_checkpoint_means_the_same_folder_wherever_workers_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llava").mkdir()
    (tmp_path / "own.jinja").touch()
    settings = ModelSettings(checkpoint="llava", chat_template="own.jinja")
    assert (settings.checkpoint, settings.chat_template) == (str(tmp_path / "llava"), str(tmp_path / "own.jinja"))
    assert ModelSettings(checkpoint="llava-hf/some", chat_template="vicuna").checkpoint == "llava-hf/some"
