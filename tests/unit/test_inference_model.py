"""The class Umbrella: answers and scores of trained checkpoints."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import umbrella
from tests.conftest import make_conversation, untrained_model
from umbrella.base import UserError
from umbrella.cohorts.bids import find_images
from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Collator
from umbrella.data.rendering import Renderer
from umbrella.evaluation.controls import make_controls
from umbrella.evaluation.scoring import ANSWER_ONLY, score
from umbrella.inference.model import Umbrella
from umbrella.modality import Modality
from umbrella.volumes.in_memory import as_images
from umbrella.volumes.reading import read_volume
from umbrella.volumes.store import DecodedVolumes, VolumeStore, prepare


@pytest.fixture(scope="module")
def model(learnt: Path) -> Umbrella:
    return umbrella.Umbrella.from_checkpoint(learnt, device="cpu")


def paths(conversation: Conversation) -> list[str]:
    return [volume.image_path for volume in conversation.volumes]


def test_answers_do_not_depend_on_the_batch_and_a_chat_keeps_its_turns(
    model: Umbrella, learnt: Path, said: list[Conversation], tmp_path: Path
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
    # In another dtype, with a store on the disk.
    other = Umbrella.from_checkpoint(learnt, device="cpu", dtype="bfloat16", store=tmp_path / "volumes")
    assert other.answer(said[:1]) == ["male."]
    store = VolumeStore(tmp_path / "volumes", model.modalities, 10_000)
    assert all(store.contains(volume.image_path, volume.modality) for volume in said[0].volumes)


def test_answers_end_at_the_end_of_the_turn_or_are_cut_at_a_limit(
    model: Umbrella, said: list[Conversation], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.answer(said[:1], max_new_tokens=2) == ["ma"]
    assert capsys.readouterr().err.startswith("note: 1 of 1 generated answers were cut before they ended; raise")
    assert [one.cut for one in model.predict(said, {}, max_new_tokens=6)] == [False, True, True]
    monkeypatch.setattr(model.model.config, "longest_answer", 13)
    assert [one.cut for one in model.predict(said, {}, max_new_tokens=None)] == [False, False, True]
    monkeypatch.setattr(model.model.config, "longest_answer", 10**6)
    assert model.max_new_tokens == 1024
    sampled = {model.ask([], "Who?", do_sample=True, temperature=50.0, max_new_tokens=8) for _ in range(3)}
    assert len(sampled) > 1


def test_a_control_is_generated_only_where_nothing_is_scored(model: Umbrella, said: list[Conversation]) -> None:
    sex = said[0].model_copy(update={"metadata": {"subject_label": "male", "target": "sex"}})
    controls, _ = make_controls([sex, said[1]], ["blank"], 0)
    candidates = {"sex": {"male": "male.", "female": "female."}}
    answers = model.predict([sex, said[1], *controls["blank"]], candidates, max_new_tokens=12)
    assert [p.text for p in answers] == ["male.", "Hello, you.", None, "Hello, you."]
    assert set(answers[2].probabilities) == {"male", "female"}
    assert model.predict(controls["blank"][:1], candidates, max_new_tokens=12)[0].text is None


def test_an_untrained_model_gives_the_same_answers_alone_in_a_batch_and_in_a_chat(
    build: Callable[..., Any], store: Any, tokenizer: Any, said: list[Conversation]
) -> None:
    model = untrained_model(build, store, tokenizer)
    renderer = model.renderer
    lengths = [len(renderer.prompt(c).input_ids) for c in said]
    assert max(lengths) > 2 * min(lengths)
    together = model.predict(said, {}, max_new_tokens=12)
    texts = [answer.text for answer in together]
    assert all(answer.cut for answer in together)
    assert texts == [model.predict([c], {}, max_new_tokens=12)[0].text for c in said]
    assert len(set(texts)) == 3

    chat = model.chat("Be brief.")
    first, second = chat.ask("Hi", max_new_tokens=4), chat.ask("And?", max_new_tokens=12)
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", first), ("user", "And?"), ("assistant", "ignored")]
    assert [second] == model.answer([make_conversation(*turns)], max_new_tokens=12)
    assert second != model.ask([], "And?", max_new_tokens=12)
    assert [turn.role for turn in chat.turns] == [role for role, _ in turns]


def test_the_prompt_has_the_tokens_of_training_up_to_the_answer(
    model: Umbrella, said: list[Conversation], tokenizer: Any, modalities: dict[str, Modality]
) -> None:
    for conversation in said:
        example = Renderer(tokenizer, modalities).render(conversation)
        last = example.spans[-1].turn
        first = next(span.start for span in example.spans if (span.turn, span.kind) == (last, "text"))
        prompt = model.renderer.prompt(conversation)
        assert prompt.input_ids.tolist() == example.input_ids[:first].tolist()
        assert prompt.conversation.volumes == conversation.volumes
    assert model.renderer.stop_ids() == [tokenizer.eos_token_id]


def test_volumes_in_memory_equal_those_of_a_store(
    cohort: dict[str, Conversation], store: VolumeStore, modalities: dict[str, Modality], tmp_path: Path
) -> None:
    decoded = DecodedVolumes(modalities, 10_000)

    def read(source: Any, path: Any, name: str, rng_key: tuple[int, ...] | None = None) -> np.ndarray:
        modality = modalities[name]
        shape = (modality.grid[3], *modality.grid[:3]) if modality.is_series else modality.grid
        into = np.empty(shape, np.float16)
        source.read(path, name, into, rng_key)
        return into

    for volume in cohort["two"].volumes:
        for key in (None, (0,), (1,)):
            ours, theirs = (read(of, volume.image_path, volume.modality, key) for of in (decoded, store))
            np.testing.assert_array_equal(ours, theirs)
    copy = shutil.copy(cohort["two"].volumes[1].image_path, tmp_path / "changes.nii")
    before = read(decoded, copy, "sMRI")
    shutil.copy(cohort["three"].volumes[0].image_path, copy)
    assert (before != read(decoded, copy, "sMRI")).any(), "a changed file is read again"


def test_scores_equal_those_of_evaluations(model: Umbrella, said: list[Conversation], store: VolumeStore) -> None:
    s2, answers = paths(said[2])[0], ["male.", "female.", "Hello, you."]
    metadata = {"subject_label": "male.", "target": "sex"}
    asked = make_conversation(("user", [("sMRI", s2), "Sex?"]), ("assistant", "male."), metadata=metadata)
    candidates = {"sex": {answer: answer for answer in answers}}
    (expected,) = score(model.model, [asked], model.renderer, Collator(model.renderer, store), candidates)
    found = model.score(s2, "Sex?", answers, modality="sMRI")
    assert found == pytest.approx(expected.probabilities, abs=1e-6)
    assert sum(found.values()) == pytest.approx(1)
    with pytest.raises(UserError, match="give a list of texts to choose from"):
        model.score(s2, "Sex?", "male.", modality="sMRI")


@pytest.mark.parametrize(
    "options", [{"train": "projector", "dtype": "bfloat16"}, {"train": "embedder+lora", "lora_rank": 2}]
)
def test_a_partial_checkpoint_answers_with_its_base_and_saved_without_it(
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
    for name, weight in trained.named_parameters():
        assert torch.equal(model.model.get_parameter(name), weight), name
        assert model.model.get_parameter(name).dtype == weight.dtype, name
    answers, scores = model.answer(said, max_new_tokens=6), model.score([], "Sex?", ["male.", "female."])

    model.save_pretrained(tmp_path / "alone")
    shutil.move(tmp_path / "alone", tmp_path / "elsewhere")
    shutil.move(tmp_path / "base", tmp_path / "gone")
    alone = Umbrella.from_checkpoint(tmp_path / "elsewhere")
    assert alone.answer(said, max_new_tokens=6) == answers
    assert alone.score([], "Sex?", ["male.", "female."]) == pytest.approx(scores, abs=1e-5)
    with pytest.raises(UserError, match=r"model\.safetensors there is gone; put it back"):
        Umbrella.from_checkpoint(step)


def test_the_modality_of_a_volume_follows_from_its_suffix_or_axes_or_is_named(
    model: Umbrella, said: list[Conversation], tmp_path: Path
) -> None:
    s2, d, f2 = paths(said[2])
    for name, modality in (("sub-01_ses-01_T1w.nii", "sMRI"), ("sub-01_FA.nii", "dMRI"), ("a_bold.nii", "fMRI")):
        file = shutil.copy(s2, tmp_path / name)
        assert [item.modality for item in (*model.items(file), *model.items(file, "dMRI"))] == [modality, "dMRI"]
    assert [item.modality for item in model.items([f2, f2])] == ["fMRI", "fMRI"]
    assert [item.modality for item in model.items([s2, d], ["sMRI", "dMRI"])] == ["sMRI", "dMRI"]


def test_the_modality_of_a_file_is_that_which_the_reader_of_cohorts_gives_it(model: Umbrella, tmp_path: Path) -> None:
    names = ["sub-1_T1w", "sub-1_PDw", "sub-1_model-DTI_param-fa_dwimap", "sub-1_desc-MD_dwimap", "sub-1_task-x_bold"]
    files = [tmp_path / "sub-1" / f"{name}.nii.gz" for name in names] + [tmp_path / "fs" / "mri" / "brain.mgz"]
    files += [tmp_path / "sub-1" / "sub-1_pet.nii"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    suffixes = {"T1w": "sMRI", "PDw": "sMRI", "FA": "dMRI", "MD": "dMRI", "bold": "fMRI", "pet": "dMRI"}
    images = find_images(tmp_path, [tmp_path], suffixes, {}, False, lambda things, what: things)
    read = {str(tmp_path / scan.path): scan.modality for scans in images.scans.values() for scan in scans}
    assert set(read) == {str(file) for file in files}
    settings = model.settings.with_values({"data.suffixes": {"pet": "dMRI"}})
    asked = Umbrella(model.model, model.renderer, model.collate, settings).items(list(read))
    assert [item.modality for item in asked] == list(read.values())


def test_a_model_accepts_the_modalities_that_it_was_trained_on(
    build: Callable[..., Any], save_model: Callable[..., Path], said: list[Conversation], tmp_path: Path
) -> None:
    trained = build()
    trained.config.trained_modalities = ["sMRI"]
    model = Umbrella.from_checkpoint(save_model(tmp_path / "training", trained), device="cpu")
    s2, d, _ = paths(said[2])
    assert [item.modality for item in model.items([s2])] == ["sMRI"]
    with pytest.raises(UserError, match="modality='dMRI': this model was trained on sMRI"):
        model.ask(d, "What is this?", modality="dMRI")
    model.save_pretrained(tmp_path / "saved")
    assert list(Umbrella.from_checkpoint(tmp_path / "saved", device="cpu").modalities) == ["sMRI"]


def test_user_errors_are_one_clear_line(
    model: Umbrella, learnt: Path, said: list[Conversation], tmp_path: Path
) -> None:
    (tmp_path / "text.nii.gz").write_text("no volume", encoding="utf-8")
    nib.save(nib.Nifti1Image(np.ones((2, 2), np.float32), np.eye(4)), tmp_path / "flat.nii")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llava"}', encoding="utf-8")
    bare = shutil.copytree(learnt, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    cut = shutil.copytree(learnt, tmp_path / "cut", ignore=shutil.ignore_patterns("model.safetensors"))
    load: Callable[..., Any] = Umbrella.from_checkpoint
    s2, d, _ = paths(said[2])
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: model.ask(s2, "?"), r"s2\.nii: has 3 axes and may be dMRI or sMRI; name its modality: "),
        (lambda: model.ask(s2, "?", "CT"), "modality='CT': this model was trained on dMRI, fMRI, sMRI"),
        (lambda: model.ask([s2, d], "?", ["sMRI"]), "1 names for 2 volumes"),
        (lambda: model.ask(tmp_path / "none.nii", "?"), r"none\.nii does not exist$"),
        (lambda: model.ask(tmp_path, "?"), r"is a folder$"),
        (lambda: model.ask(tmp_path / "text.nii.gz", "?", "sMRI"), r"text\.nii\.gz: cannot be read as an image: "),
        (lambda: model.ask(tmp_path / "flat.nii", "?"), r"flat\.nii: has 2 axes and is of no modality that this model"),
        (lambda: load(tmp_path / "nowhere"), r"nowhere: is no checkpoint: it has no config\.json"),
        (lambda: load(learnt.parent), r"is a training, not one of its checkpoints; name one, .*/step_0000001 say$"),
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
    assert [turn.role for turn in chat.turns] == ["system"], "a question that fails is not added"


def test_images_and_arrays_in_memory_give_the_numbers_of_their_files(
    model: Umbrella, stored: dict[str, Path], said: list[Conversation], tmp_path: Path
) -> None:
    def prepared(volume: Any, modality: str) -> np.ndarray:
        return (
            model.collate([model.renderer.prompt(model.question(volume, "?", modality))], ANSWER_ONLY)
            .pixel_values[modality]
            .voxels.numpy()
        )

    for path in stored.values():
        image, expected = nib.load(path), prepared(path, "sMRI")
        data = np.ascontiguousarray(image.get_fdata())
        for volume in (nib.load(path), (data, image.affine), nib.Nifti1Image(data, image.affine)):
            np.testing.assert_array_equal(prepared(volume, "sMRI"), expected)
    # Where the memory order and the place of the scaling decide about the last bits.
    voxels, wide = np.random.default_rng(0).normal(100, 30, (40, 37, 33)), Modality(grid=(24,) * 3, patch=(8,) * 3)
    scaled = nib.Nifti1Image((10 * voxels).astype(np.int16), np.eye(4))
    scaled.header.set_slope_inter(0.0123, 7)
    for image in (scaled, nib.Nifti1Image(voxels.astype(np.float32), np.eye(4))):
        nib.save(image, tmp_path / "wide.nii")
        expected = prepare(tmp_path / "wide.nii", wide, 10**6)
        np.testing.assert_array_equal(prepare(nib.load(tmp_path / "wide.nii"), wide, 10**6), expected)
    (array,) = as_images((np.ascontiguousarray(voxels.astype(np.float32)), np.eye(4)))
    np.testing.assert_array_equal(prepare(array, wide, 10**6), expected)
    series = paths(said[2])[2]
    loaded = nib.load(series)
    np.testing.assert_array_equal(prepared((loaded.get_fdata(), loaded.affine), "fMRI"), prepared(series, "fMRI"))
    in_microns = nib.load(stored["plain"])
    in_microns.header.set_xyzt_units("micron")
    nib.save(in_microns, tmp_path / "microns.nii")
    expected = read_volume(tmp_path / "microns.nii", 3, 10_000)
    found = read_volume(nib.load(tmp_path / "microns.nii"), 3, 10_000)
    assert found.spacing == expected.spacing == (0.001, 0.002, 0.0035)


def test_all_questions_accept_images_in_memory(model: Umbrella, said: list[Conversation], tmp_path: Path) -> None:
    s2, d, f2 = paths(said[2])
    images = [nib.load(s2), (nib.load(d).get_fdata(), nib.load(d).affine)]
    names, chat = ["sMRI", "dMRI"], model.chat()
    assert model.ask(images, "", modality=names) == chat.ask("", images, names) == "Seen."
    assert chat.ask("And?") == model.answer([chat_of_paths(model, [s2, d], names, "And?")])[0]
    score = [model.score(volumes, "Sex?", ["male.", "female."], names) for volumes in ([s2, d], images)]
    assert score[0] == score[1]
    nib.save(nib.load(s2), tmp_path / "sub-1_FA.nii")
    found = model.items([nib.load(tmp_path / "sub-1_FA.nii"), nib.Nifti1Image(nib.load(f2).get_fdata(), np.eye(4))])
    assert [item.modality for item in found] == ["dMRI", "fMRI"]
    with pytest.raises(UserError, match=r"^image in memory: every voxel is 1; there is nothing to see, leave it out$"):
        model.ask((np.ones((4, 4, 4)), np.eye(4)), "?", "sMRI")
    with pytest.raises(UserError, match=r"array and affine \(4, 4\); this is an affine of shape \(3, 3\)$"):
        model.ask((np.ones((4, 4, 4)), np.eye(3)), "?", "sMRI")
    with pytest.raises(UserError, match=r"this is list$"):
        model.ask([[1, 2]], "?", "sMRI")  # type: ignore[list-item]


def chat_of_paths(model: Umbrella, files: list[str], modalities: list[str], text: str) -> Conversation:
    first = model.question(files, "", modalities).with_answer("Seen.")
    return model.question([], text, turns=first.conversations)
