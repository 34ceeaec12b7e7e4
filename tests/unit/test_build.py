"""Building of models: tiny, from a plain LLaVA or from a saved model; errors of checkpoints; trainable parameters."""

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

from tests.conftest import nll
from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.data.batching import Batch
from umbrella.data.rendering import load_renderer
from umbrella.modality import Modality
from umbrella.models.build import build_model, component_parameters
from umbrella.models.settings import ModelSettings
from umbrella.models.umbrella_llava import UmbrellaForConditionalGeneration as Umbrella

Build = Callable[..., Umbrella]
Save = Callable[..., Any]
LAYER = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture
def batch(batch_of: Callable[..., Batch]) -> Batch:
    return batch_of("two", "none", "three")


@pytest.mark.parametrize(
    ("train", "trainable"),
    [
        ("embedder", {"embedder"}),
        ("embedder+projector+tower", {"embedder", "projector", "tower"}),
        ("embedder+lora", {"embedder", "lora"}),
        ("lora", {"lora"}),
        ("all", {"embedder", "tower", "projector", "language_model"}),
    ],
)
def test_exactly_the_named_components_get_gradients(
    build: Build, batch: Batch, train: str, trainable: set[str]
) -> None:
    model = build(train=train)
    model(**batch.model_inputs()).token_nll.sum().backward()
    norm = set(model.model.vision_tower.post_layernorm.parameters())  # without effect on the output
    for name, weights in component_parameters(model).items():
        assert {p.grad is not None for p in weights if p not in norm} == {name in trainable}, name
    assert sum(len(weights) for weights in component_parameters(model).values()) == len(list(model.parameters()))


@pytest.mark.parametrize(("tower", "language"), [("siglip", "qwen2"), ("clip", "llama")])
def test_plain_llava_keeps_its_weights_and_gets_a_new_embedder(
    build: Build, save_llava: Save, batch: Batch, tmp_path: Path, tower: str, language: str
) -> None:
    plain = save_llava(tmp_path, tower, language).state_dict()
    model = build(checkpoint=str(tmp_path))
    loaded = model.state_dict()
    flat = "model.vision_tower.embeddings."  # 2D patches and positions are replaced
    kept = {name for name in plain if not name.startswith(flat)}
    assert [name for name in kept if not torch.equal(plain[name], loaded[name])] == []
    new = {name for name in loaded if name not in kept}
    assert all(n.startswith(f"{flat}by_modality.") or n == f"{flat}class_embedding" for n in new)
    for embedder in model.embedder.by_modality.values():
        assert 0.5 < embedder.projection.weight.std() * embedder.projection.in_features**0.5 < 2
        assert all(0.005 < table.std() < 0.06 for table in embedder.positions)
    if tower == "clip":
        whole = plain[f"{flat}class_embedding"] + plain[f"{flat}position_embedding.weight"][0]
        assert torch.equal(model.embedder.class_embedding, whole)
    assert (nll(model, batch)[batch.loss_weights != 0] > 0).all()


@pytest.mark.parametrize(("tower", "layer"), [("siglip", -2), ("clip", -1), ("clip", [0, 1])])
def test_every_trainable_weight_has_a_gradient_for_any_feature_layer(
    build: Build, save_llava: Save, batch: Batch, tmp_path: Path, tower: str, layer: Any
) -> None:
    save_llava(tmp_path, tower, vision_feature_layer=layer)
    model = build(checkpoint=str(tmp_path))
    model(**batch.model_inputs()).token_nll.sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.requires_grad for p in model.model.vision_tower.encoder.layers[0].parameters())


def test_saved_model_gives_the_same_outputs(build: Build, batch: Batch, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    for again in (build(checkpoint=str(tmp_path)), Umbrella.from_pretrained(tmp_path)):
        assert again.config.modalities == model.config.modalities
        assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
        assert torch.equal(nll(again, batch), nll(model, batch))


def test_saved_model_is_loaded_with_other_modalities_and_grids(build: Build, tmp_path: Path) -> None:
    patch = {"patch": (2, 4, 4)}
    model = build(modalities={"sMRI": Modality(grid=(4, 4, 4), **patch)})
    model.save_pretrained(tmp_path)
    wider = {"sMRI": Modality(grid=(8, 8, 4), **patch), "PET": Modality(grid=(4, 4, 4), **patch)}
    again = build(modalities=wider, checkpoint=str(tmp_path))
    before, after = (m.embedder.by_modality["sMRI"] for m in (model, again))
    assert torch.equal(before.projection.weight, after.projection.weight)
    assert [len(table) for table in after.positions] == [4, 2, 1]
    assert all(0.005 < table.std() < 0.06 for table in again.embedder.by_modality["PET"].positions)
    assert (again.config.modalities, list(again.embedder.by_modality)) == (wider, ["sMRI", "PET"])


def test_modalities_that_do_not_fit_a_saved_model_are_an_error(build: Build, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    other = Modality(grid=(4, 4, 4), patch=(2, 2, 2))
    with pytest.raises(UserError, match=r"reads sMRI in patches of 2x4x4, and modalities\.sMRI\.patch is 2x2x2; take"):
        build(modalities={"sMRI": other}, checkpoint=str(tmp_path))
    with pytest.raises(UserError, match="has no embedder for PET, and no 2D weights to inflate one from"):
        build(modalities={"PET": other}, checkpoint=str(tmp_path), embedder_init="inflated")


def test_unusable_checkpoint_is_an_error_with_the_reason(build: Build, save_llava: Save, tmp_path: Path) -> None:
    siglip, qwen = SiglipVisionConfig(**LAYER), Qwen2Config(**LAYER)
    qwen.save_pretrained(tmp_path / "qwen")
    LlavaConfig(vision_config=siglip, text_config=MistralConfig(**LAYER)).save_pretrained(tmp_path / "mistral")
    LlavaConfig(vision_config=DINOv3ViTConfig(**LAYER), text_config=qwen).save_pretrained(tmp_path / "dino")
    weights = save_llava(tmp_path / "half").state_dict()
    save_file({n: w for n, w in weights.items() if "projector" not in n}, tmp_path / "half" / "model.safetensors")
    save_llava(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    save_llava(tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pickle" / "pytorch_model.bin")
    for name, message in [
        ("none", "cannot be loaded: "),
        ("qwen", "is a qwen2; llava, llava_next, llava_onevision, umbrella_llava work"),
        ("mistral", "its language model is mistral; qwen2 and llama work"),
        ("dino", "its tower is dinov3_vit; siglip_vision_model and clip_vision_model work"),
        ("half", r"lacks 4 weights, model\.multi_modal_projector\.linear_1\.bias among them"),
        ("cut", "cannot be loaded: "),
        ("pickle", r"cannot be loaded: .*model\.safetensors"),
    ]:
        with pytest.raises(UserError, match=f"^model.checkpoint={tmp_path / name}: {message}"):
            build(checkpoint=str(tmp_path / name))
    with pytest.raises(ValueError, match=r"is a llava without volume embedders; umbrella\.models\.build\.build_model"):
        Umbrella.from_pretrained(tmp_path / "half")
    build().save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "model.safetensors").rename(tmp_path / "ours" / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        Umbrella.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "part", ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
def test_python_code_of_a_checkpoint_is_not_run(
    save_llava: Save,
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


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_weights_of_llava_next_and_onevision_are_kept(build: Build, batch: Batch, tmp_path: Path, kind: str) -> None:
    components = {
        "vision_config": SiglipVisionConfig(**LAYER, image_size=8, patch_size=4, vision_use_head=False),
        "text_config": Qwen2Config(**LAYER, num_key_value_heads=1, vocab_size=264),
        "vision_feature_layer": -1,
    }
    plain = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **components))
    plain.save_pretrained(tmp_path / kind)
    model = build(checkpoint=str(tmp_path / kind), embedder_init="inflated")
    for component in ("vision_tower.encoder", "multi_modal_projector", "language_model"):
        theirs, ours = (m.model.get_submodule(component).state_dict() for m in (plain, model))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(nll(build(checkpoint=str(tmp_path / "saved")), batch), nll(model, batch))


def test_checkpoint_gets_the_attention_of_the_settings_and_greedy_decoding(
    build: Build, save_llava: Save, tmp_path: Path
) -> None:
    save_llava(tmp_path)
    GenerationConfig(
        do_sample=True, temperature=2.0, num_beams=3, repetition_penalty=1.5, eos_token_id=7
    ).save_pretrained(tmp_path)
    for model in (build(attention="eager"), build(attention="eager", checkpoint=str(tmp_path))):
        assert model.model.language_model.config._attn_implementation == "eager"
        assert model.model.vision_tower.config._attn_implementation == "sdpa"
    own = model.generation_config
    assert (own.do_sample, own.num_beams, own.repetition_penalty, own.temperature) == (None, None, None, None)
    assert own.eos_token_id == 7


def test_relative_paths_of_the_model_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llava").mkdir()
    (tmp_path / "own.jinja").touch()
    settings = ModelSettings(checkpoint="llava", chat_template="own.jinja")
    assert (settings.checkpoint, settings.chat_template) == (str(tmp_path / "llava"), str(tmp_path / "own.jinja"))
    assert ModelSettings(checkpoint="llava-hf/some", chat_template="vicuna").checkpoint == "llava-hf/some"
