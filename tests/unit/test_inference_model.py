"""A trained checkpoint answers: it sees what training would have shown it, wherever it lies, alone or side by side."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import umbrella
from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Collator
from umbrella.data.rendering import Renderer
from umbrella.evaluation.scoring import score
from umbrella.inference.model import Umbrella
from umbrella.modality import Modality
from umbrella.volumes.store import DecodedVolumes, VolumeStore


@pytest.fixture(scope="module")
def model(learnt: Path) -> Umbrella:
    return umbrella.Umbrella.from_checkpoint(learnt, device="cpu")


def paths(conversation: Conversation) -> list[str]:
    return [volume.image_path for volume in conversation.volumes]


def test_a_checkpoint_says_what_it_was_taught_alone_side_by_side_and_in_a_conversation(
    model: Umbrella, said: list[Conversation]
) -> None:
    answers = [c.answer for c in said]
    assert answers == ["male.", "Hello, you.", "Seen. And 2 more, é."]
    assert model.answer(said) == model.answer(said, batch_size=1) == answers
    chat = model.chat()
    assert chat.ask("Hi") == "Hello, you."
    [_, turn] = chat.turns
    assert (turn.role, turn.content[0].text) == ("assistant", "Hello, you.")
    s2, d, _ = paths(said[2])
    assert model.ask([s2, d], "", modality=["sMRI", "dMRI"]) == "Seen."


def test_answers_end_at_the_end_of_a_turn_or_are_cut_at_a_limit_and_counted(
    model: Umbrella, said: list[Conversation], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.answer(said[:1], max_new_tokens=2) == ["ma"]
    assert capsys.readouterr().err.startswith("note: 1 of 1 generated answers were cut before they ended; raise")
    assert model.answer(said[:1], max_new_tokens=6) == ["male."]
    assert [one.cut for one in model.predict(said, {}, max_new_tokens=6)] == [False, True, True]
    monkeypatch.setattr(model.model.config, "longest_answer", 13)
    assert [one.cut for one in model.predict(said, {}, max_new_tokens=None)] == [False, False, True]
    monkeypatch.setattr(model.model.config, "longest_answer", 10**6)
    assert model.max_new_tokens == 1024
    assert capsys.readouterr().err == ""
    drawn = {model.ask([], "Who?", do_sample=True, temperature=50.0, max_new_tokens=8) for _ in range(3)}
    assert len(drawn) > 1


@pytest.fixture
def babbling(build: Callable[..., Any], store: Any, tokenizer: Any) -> Umbrella:
    """A model that says something else to everything."""
    model, renderer = build(seed=3), Renderer(tokenizer, store.modalities)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.4)
    return Umbrella(model, renderer, Collator(renderer, store), load_settings())


def test_differently_long_prompts_are_answered_side_by_side_as_one_by_one(
    babbling: Umbrella, said: list[Conversation]
) -> None:
    lengths = [len(babbling.renderer.prompt(c).input_ids) for c in said]
    assert max(lengths) > 2 * min(lengths)
    together = babbling.predict(said, {}, max_new_tokens=12)
    assert all(answer.cut for answer in together)
    texts = [answer.text for answer in together]
    assert texts == [babbling.predict([c], {}, max_new_tokens=12)[0].text for c in said]
    assert len(set(texts)) == 3


def test_a_follow_up_is_asked_with_all_that_was_said_before(babbling: Umbrella, talk: Callable[..., Any]) -> None:
    chat = babbling.chat("Be brief.")
    first, second = chat.ask("Hi", max_new_tokens=4), chat.ask("And?", max_new_tokens=12)
    before = [("system", "Be brief."), ("user", "Hi"), ("assistant", first), ("user", "And?")]
    assert [second] == babbling.answer([talk(*before, ("assistant", "not looked at"))], max_new_tokens=12)
    assert second != babbling.ask([], "And?", max_new_tokens=12)
    assert [turn.role for turn in chat.turns] == ["system", "user", "assistant", "user", "assistant"]


def test_generation_sees_the_tokens_that_training_would_up_to_the_answers_first(
    model: Umbrella, said: list[Conversation], tokenizer: Any, modalities: dict[str, Modality]
) -> None:
    in_training = Renderer(tokenizer, modalities)
    for conversation in said:
        example = in_training.render(conversation)
        last = example.spans[-1].turn
        first = next(span.start for span in example.spans if (span.turn, span.kind) == (last, "text"))
        prompt = model.renderer.prompt(conversation)
        assert prompt.input_ids.tolist() == example.input_ids[:first].tolist()
        assert tokenizer.decode(prompt.input_ids).endswith("<|im_start|>assistant\n")
        assert prompt.conversation.volumes == conversation.volumes
    assert model.renderer.stop_ids() == [tokenizer.eos_token_id]


def test_volumes_in_memory_are_those_of_a_store(
    cohort: dict[str, Conversation], store: VolumeStore, modalities: dict[str, Modality], tmp_path: Path
) -> None:
    decoded = DecodedVolumes(modalities, 10_000)
    for volume in [*cohort["two"].volumes, *cohort["three"].volumes]:
        modality = modalities[volume.modality]
        shape = (modality.grid[3], *modality.grid[:3]) if modality.is_series else modality.grid
        for draw in (None, (0,), (1,), (2,)):
            ours, theirs = np.empty(shape, np.float16), np.empty(shape, np.float16)
            decoded.read(volume.image_path, volume.modality, ours, draw)
            store.read(volume.image_path, volume.modality, theirs, draw)
            np.testing.assert_array_equal(ours, theirs)
    copy = shutil.copy(cohort["two"].volumes[1].image_path, tmp_path / "changes.nii")
    before, after = np.empty((4, 4, 4), np.float16), np.empty((4, 4, 4), np.float16)
    decoded.read(copy, "sMRI", before)
    shutil.copy(cohort["three"].volumes[0].image_path, copy)
    decoded.read(copy, "sMRI", after)
    assert (before != after).any()


def test_a_store_that_is_given_holds_what_was_asked_about(
    learnt: Path, said: list[Conversation], tmp_path: Path
) -> None:
    model = Umbrella.from_checkpoint(learnt, device="cpu", store=tmp_path / "volumes")
    assert model.answer(said[:1]) == ["male."]
    held = VolumeStore(tmp_path / "volumes", model.modalities, 10_000)
    assert all(held.contains(volume.image_path, volume.modality) for volume in said[0].volumes)


def test_scores_are_those_of_evaluations_in_training(
    model: Umbrella, said: list[Conversation], store: VolumeStore, talk: Callable[..., Conversation]
) -> None:
    s2 = paths(said[2])[0]
    labelled = {"subject_label": "male.", "target": "sex"}
    asked = talk(("user", [("sMRI", s2), "Sex?"]), ("assistant", "male."), metadata=labelled)
    candidates = {"sex": {"male.": "male.", "female.": "female.", "Hello, you.": "Hello, you."}}
    collate = Collator(model.renderer, store)
    (expected,) = score(model.model, [asked], model.renderer, collate, candidates)
    found = model.score(s2, "Sex?", list(candidates["sex"]), modality="sMRI")
    assert found == pytest.approx(expected.probabilities, abs=1e-6)
    assert sum(found.values()) == pytest.approx(1)
    with pytest.raises(UserError, match="give a list of texts to choose from"):
        model.score(s2, "Sex?", "male.", modality="sMRI")


LORA = {"train": "embedder+lora", "lora_rank": 2}


@pytest.mark.parametrize("options", [{"train": "projector"}, LORA | {"dtype": "bfloat16"}])
def test_what_was_trained_on_a_base_answers_with_it_and_alone_wherever_it_lies(
    build: Callable[..., Any], save_model: Any, save_llava: Any, tokenizer: Any, said: Any, tmp_path: Path, options: Any
) -> None:
    save_llava(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = {"checkpoint": str(tmp_path / "base"), **options}
    trained = build(**options)
    with torch.no_grad():
        for weight in trained.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    step = save_model(tmp_path / "run", trained, **{f"model.{name}": value for name, value in options.items()})
    model = Umbrella.from_checkpoint(step)
    for name, weight in trained.named_parameters():  # the very numbers, and the dtype, that training computed with
        assert torch.equal(model.model.get_parameter(name), weight), name
        assert model.model.get_parameter(name).dtype == weight.dtype, name
    answers = model.answer(said, max_new_tokens=6)
    scores = model.score([], "Sex?", ["male.", "female."])

    model.save_pretrained(tmp_path / "alone")
    shutil.move(tmp_path / "alone", tmp_path / "elsewhere")
    shutil.move(tmp_path / "base", tmp_path / "gone")
    alone = Umbrella.from_checkpoint(tmp_path / "elsewhere")
    assert alone.answer(said, max_new_tokens=6) == answers
    assert alone.score([], "Sex?", ["male.", "female."]) == scores
    with pytest.raises(UserError, match=r"model\.safetensors there is gone; put it back"):
        Umbrella.from_checkpoint(step)


def test_a_checkpoint_answers_wherever_it_lies_and_in_another_dtype(
    learnt: Path, said: list[Conversation], tmp_path: Path
) -> None:
    moved = shutil.copytree(learnt, tmp_path / "moved")
    assert Umbrella.from_checkpoint(moved, dtype="bfloat16").answer(said[:1]) == ["male."]


def test_a_modality_is_told_by_suffix_or_axes_or_named(
    model: Umbrella, said: list[Conversation], tmp_path: Path
) -> None:
    s2, d, f2 = paths(said[2])
    for name, modality in (("sub-01_ses-01_T1w.nii", "sMRI"), ("sub-01_FA.nii", "dMRI"), ("a_bold.nii", "fMRI")):
        (item,) = model.items(shutil.copy(s2, tmp_path / name))
        assert item.modality == modality
        (item,) = model.items(tmp_path / name, "dMRI")
        assert item.modality == "dMRI"
    one = model.settings.model_copy(update={"modalities": {"dMRI": model.modalities["dMRI"]}})
    with pytest.raises(UserError, match="modality='sMRI': this model was trained on dMRI"):
        Umbrella(model.model, model.renderer, model.collate, one).items(tmp_path / "sub-01_ses-01_T1w.nii")
    assert [item.modality for item in model.items([f2, f2])] == ["fMRI", "fMRI"]
    assert [item.modality for item in model.items([s2, d], ["sMRI", "dMRI"])] == ["sMRI", "dMRI"]
    with pytest.raises(UserError, match=r"s2\.nii: has 3 axes and may be dMRI or sMRI; name its modality: "):
        model.ask(s2, "?")
    with pytest.raises(UserError, match="modality='CT': this model was trained on dMRI, fMRI, sMRI"):
        model.ask(s2, "?", modality="CT")
    with pytest.raises(UserError, match="1 names for 2 volumes"):
        model.ask([s2, d], "?", modality=["sMRI"])


def test_what_cannot_be_answered_is_one_clear_line(model: Umbrella, learnt: Path, tmp_path: Path) -> None:
    (tmp_path / "text.nii.gz").write_text("no volume", encoding="utf-8")
    nib.save(nib.Nifti1Image(np.ones((2, 2), np.float32), np.eye(4)), tmp_path / "flat.nii")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llava"}', encoding="utf-8")
    bare = shutil.copytree(learnt, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    cut = shutil.copytree(learnt, tmp_path / "cut")
    (cut / "model.safetensors").unlink()
    load: Callable[..., Any] = Umbrella.from_checkpoint
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: model.ask(tmp_path / "none.nii", "?"), r"none\.nii does not exist$"),
        (lambda: model.ask(tmp_path, "?"), r"is a folder$"),
        (lambda: model.ask(tmp_path / "text.nii.gz", "?"), r"text\.nii\.gz: cannot be read as an image: "),
        (lambda: model.ask(tmp_path / "text.nii.gz", "?", "sMRI"), r"text\.nii\.gz: cannot be read as an image: "),
        (lambda: model.ask(tmp_path / "flat.nii", "?"), r"flat\.nii: has 2 axes and is of no modality that this model"),
        (lambda: load(tmp_path / "nowhere"), r"nowhere: is no checkpoint: it has no config\.json"),
        (
            lambda: load(learnt.parent),
            r"run: is a training, not one of its checkpoints; name one, .*/step_0000001 say$",
        ),
        (lambda: load(tmp_path / "other"), r"other: is a llava, and no model that was trained here$"),
        (lambda: load(bare), r"bare: has no tokenizer; write the one"),
        (lambda: load(cut), r"cut: cannot be loaded: "),
        (lambda: load(learnt, dtype="float8"), r"dtype='float8': float32 and bfloat16 work$"),
        (lambda: load(learnt, device="abacus"), r"device=abacus: "),
    ]
    for call, words in cases:
        with pytest.raises(UserError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
    chat = model.chat("Be brief.")
    with pytest.raises(UserError):
        chat.ask("?", tmp_path / "none.nii")
    assert [turn.role for turn in chat.turns] == ["system"]


def test_a_checkpoint_answers_about_the_modalities_that_it_was_trained_on(
    build: Callable[..., Any], save_model: Callable[..., Path], cohort: dict[str, Conversation], tmp_path: Path
) -> None:
    s1, dmri = cohort["two"].volumes[1].image_path, cohort["three"].volumes[1].image_path
    trained = build()
    trained.config.trained_modalities = ["sMRI"]
    model = Umbrella.from_checkpoint(save_model(tmp_path / "training", trained), device="cpu")
    assert list(model.modalities) == ["sMRI"]
    assert [item.modality for item in model.items([s1])] == ["sMRI"]
    with pytest.raises(UserError, match="modality='dMRI': this model was trained on sMRI"):
        model.ask(dmri, "What is this?", modality="dMRI")
    model.save_pretrained(tmp_path / "saved")
    assert list(Umbrella.from_checkpoint(tmp_path / "saved", device="cpu").modalities) == ["sMRI"]
