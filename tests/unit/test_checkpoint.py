"""Checkpoints: a training continues from one to the last bit, and no file of it can run code when it is read."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import make_writer
from tests.unit.steps import Make, Training
from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.models.partial_checkpoint import parameters_to_save
from umbrella.models.settings import ModelSettings
from umbrella.training.checkpoint_files import CheckpointWriter, TrainingState, latest_checkpoint, read_training_state
from umbrella.training.distributed import copy_training_state, restore_training_state
from umbrella.training.trainer import code_versions, describe_code_changes
from umbrella.version import __version__


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(
    ("train", "dtype"),
    [("all", "float32"), ("embedder+projector", "bfloat16"), ("projector", "float32"), ("embedder+lora", "bfloat16")],
)
def test_a_restored_training_continues_to_the_last_bit_and_saves_only_what_its_base_lacks(
    build: Make,
    batch_of: Make,
    save_llava: Any,
    save_step: Make,
    tmp_path: Path,
    train: str,
    dtype: str,
    with_base: bool,
) -> None:
    base = str(tmp_path / "base") if with_base else ""
    if base:
        save_llava(tmp_path / "base")
    options = {"checkpoint": base, "train": train, "dtype": dtype, "lora_rank": 2}
    batches = [batch_of(name) for name in ("two", "three", "none", "three", "two", "none")]
    one = Training(build(**options), dtype=getattr(torch, dtype))
    one.losses(batches[:3])
    step = save_step(tmp_path / "run", one, 3, **{f"model.{name}": value for name, value in options.items()})
    rest = one.losses(batches[3:])

    partial = with_base and train != "all"
    written = load_file(step / ("trained.safetensors" if partial else "model.safetensors"))
    if partial:
        trained = {n for n, w in one.model.named_parameters() if w.requires_grad and ".lora_" not in n}
        embedder = {n for n, _ in one.model.named_parameters() if "embeddings.by_modality" in n}  # no base has it
        assert written.keys() == trained | embedder
    assert (step / "model.safetensors").exists() == (not partial)
    assert (step / "adapter").exists() == ("lora" in train)
    other = Training(build(seed=1, **options), dtype=getattr(torch, dtype))
    other.restore(step, parameters_to_save(other.model, ModelSettings(**options)))
    assert other.losses(batches[3:]) == rest
    torch.testing.assert_close(other.model.state_dict(), one.model.state_dict(), rtol=0, atol=0)
    assert [w.dtype for w in other.model.parameters()] == [w.dtype for w in one.model.parameters()]


def test_a_checkpoint_of_other_weights_is_an_error(build: Make, save_step: Make, tmp_path: Path) -> None:
    step = save_step(tmp_path, Training(build()), 3)
    wider = Training(build(width=32))
    with pytest.raises(UserError, match=r"model\.safetensors: does not fit: .* is of shape .*, the model has one of"):
        wider.restore(step, [])
    adapted = Training(build(train="embedder+lora", lora_rank=2))
    with pytest.raises(UserError, match=r"does not fit: it lacks 28 weights, base_model\.model\..*lora_A.* among them"):
        adapted.restore(step, parameters_to_save(adapted.model, ModelSettings()))


def test_every_file_is_text_or_has_only_tensors_and_numbers(
    build: Make, batch_of: Make, save_step: Make, tmp_path: Path
) -> None:
    training = Training(build())
    training.step(batch_of("two"))
    step = save_step(tmp_path, training, 1, seed=7)
    for file in step.iterdir():
        if file.suffix == ".pt":
            torch.load(file, weights_only=True)
        elif file.suffix == ".safetensors":
            load_file(file)
        else:
            assert file.suffix in (".json", ".yaml", ".jinja"), file
            file.read_text(encoding="utf-8")
    assert load_settings([str(step / "settings.yaml")]).seed == 7
    assert read_training_state(step) == TrainingState(step=1, position=4)


def test_each_rank_that_was_there_continues_its_random_numbers(build: Make, save_step: Make, tmp_path: Path) -> None:
    one, states, following = Training(build()), [], []
    for seed in (1, 2, 7):
        torch.manual_seed(seed)
        states += copy_training_state(one.optimizer, one.schedule)["rng"]
        following.append(torch.rand(3))
    step = save_step(tmp_path, one, 3, rng=states[:2])
    for rank in (0, 1, 2):
        torch.manual_seed(7)  # which a third rank keeps
        restore_training_state(step, one.optimizer, one.schedule, rank)
        assert torch.equal(torch.rand(3), following[rank])


def test_a_checkpoint_names_the_code_that_wrote_it(build: Make, save_step: Make, tmp_path: Path) -> None:
    step = save_step(tmp_path, Training(build()), 3)
    written = {"git.commit": "abc", "torch": "1", "umbrella": __version__}
    assert json.loads((step / "code.json").read_text()) == written
    assert describe_code_changes(step, written | {"torch": "2", "ray": "3"}) == (
        "torch was 1 and is 2, ray was unknown and is 3"
    )
    assert code_versions().keys() >= {"umbrella", "torch", "transformers", "ray", "python"}


def test_a_copied_state_does_not_change_with_later_steps(build: Make, batch_of: Make) -> None:
    one, batch = Training(build()), batch_of("two")
    one.step(batch)
    copy = copy_training_state(one.optimizer, one.schedule)
    weight = next(iter(one.optimizer.state))
    before = one.optimizer.state[weight]["exp_avg"].clone()
    one.step(batch)
    assert torch.equal(copy["optimizer"]["state"][0]["exp_avg"], before)
    assert not torch.equal(one.optimizer.state[weight]["exp_avg"], before)
    assert copy["schedule"]["last_epoch"] == 1
    assert copy_training_state(one.optimizer, one.schedule, keep=False)["optimizer"]["state"][0]["exp_avg"].numel() == 0


@pytest.fixture
def writer(build: Make, tokenizer: Any, tmp_path: Path) -> tuple[CheckpointWriter, Callable[..., None]]:
    """A writer to a folder, and a function that writes with it."""
    one, settings = Training(build()), load_settings(overrides={"resources.keep_checkpoints": 1})

    def write(step: int, **metrics: float) -> None:
        measured = {f"eval/{name}": value for name, value in metrics.items()}
        tensors = copy_training_state(one.optimizer, one.schedule)
        writer.write(TrainingState(step), measured, dict(one.model.named_parameters()), tensors)

    (tmp_path / "run").mkdir()
    writer = make_writer(tmp_path / "run", one.model, tokenizer, settings)
    return writer, write


def test_a_full_disk_leaves_nothing_of_a_checkpoint_and_is_raised_by_the_next_call(
    writer: Any, tmp_path: Path, small_disk: Make
) -> None:
    writer, write = writer
    write(1)
    writer.wait()
    sizes = [file.stat().st_size for file in (tmp_path / "run" / "step_0000001").iterdir()]
    size = sum(-(-size // 4096) * 4096 for size in sizes)
    writer.folder = disk = small_disk(size * 5 // 2)
    for step, metric in ((1, 1.0), (2, 0.0), (3, 0.0)):  # the second is worse than the first, and a third has no room
        write(step, balanced_accuracy=metric)
    with pytest.raises(UserError, match="step_0000003 could not be written: No space left on device"):
        write(4)
    assert [path.name for path in sorted(disk.iterdir())] == ["step_0000001", "step_0000002"]
    assert latest_checkpoint(disk) == disk / "step_0000002"
    writer.wait()  # raised once


def test_a_folder_that_is_gone_is_not_made_again(writer: Any, tmp_path: Path) -> None:
    writer, write = writer
    os.rename(tmp_path / "run", tmp_path / "elsewhere")
    write(1)
    with pytest.raises(UserError, match=r"run/step_0000001 could not be written: .*run is gone: No such file"):
        writer.wait()
    assert not (tmp_path / "run").exists()


def test_an_error_that_is_not_of_the_storage_is_raised_as_it_is(writer: Any, tmp_path: Path) -> None:
    writer, write = writer

    def broken(*_: Any) -> None:
        raise TypeError("a mistake in the code")

    writer.save_weights = broken
    write(1)
    with pytest.raises(TypeError, match="a mistake in the code"):
        writer.wait()
    assert list((tmp_path / "run").iterdir()) == []


def test_what_a_killed_process_left_is_deleted(build: Make, save_step: Make, tmp_path: Path) -> None:
    (tmp_path / "run" / ".step_0000002.partial").mkdir(parents=True)
    (tmp_path / "run" / ".step_0000001.deleted").mkdir()
    assert latest_checkpoint(tmp_path / "run") is None
    save_step(tmp_path / "run", Training(build()), 2)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_0000002"]
