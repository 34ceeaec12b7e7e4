"""A checkpoint: what is put back goes on as if nothing had happened, and no file of it can run code when it is read."""

import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import make_writer
from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.data.batching import Batch
from umbrella.models.partial_checkpoint import parameters_to_save
from umbrella.models.settings import ModelSettings
from umbrella.models.trainable_parameters import component_parameters
from umbrella.training.checkpoint import code_versions, describe_code_changes, restore, rng_state, snapshot
from umbrella.training.checkpoint_files import CheckpointWriter, latest_checkpoint
from umbrella.training.language_model import copy_weights, load_weights
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.settings import OptimSettings
from umbrella.training.step import StepResult, train_step
from umbrella.training.training_state import TrainingState, read_training_state
from umbrella.version import __version__

OPTIM = OptimSettings(lr=1e-2, warmup=2)
STEPS = 6
ALL = ["two", "three", "none", "three", "two", "none"]

Build = Callable[..., Any]
Save = Callable[..., Path]
MakeBatch = Callable[..., Batch]


class Training:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer = build_optimizer(model, OPTIM)
        self.schedule = build_schedule(self.optimizer, OPTIM, STEPS)

    def steps(self, batches: list[Batch]) -> list[StepResult]:
        return [
            train_step(self.model, [batch], self.optimizer, self.schedule, OPTIM.clip, component_parameters(self.model))
            for batch in batches
        ]

    def restored(self, step: Path, names: list[str], rank: int = 0) -> TrainingState:
        load_weights(step, self.model, names)
        restore(step, self.optimizer, self.schedule, rank)
        return read_training_state(step)


@pytest.mark.parametrize("train", ["all", "embedder+projector"])
def test_a_restored_training_goes_on_to_the_last_bit_like_one_that_was_never_stopped(
    build: Build, batch_of: MakeBatch, save_step: Save, tmp_path: Path, train: str
) -> None:
    batches = [batch_of(name) for name in ALL]
    one = Training(build(train=train))
    one.steps(batches[:3])
    step = save_step(tmp_path, one, 3)
    rest = one.steps(batches[3:])

    other = Training(build(seed=1, train=train))
    names = parameters_to_save(other.model, ModelSettings())
    assert other.restored(step, names) == TrainingState(3, 12)
    assert other.steps(batches[3:]) == rest
    torch.testing.assert_close(other.model.state_dict(), one.model.state_dict(), rtol=0, atol=0)
    moving = [w.requires_grad for w in one.model.parameters()]
    assert [w.requires_grad for w in other.model.parameters()] == moving


@pytest.mark.parametrize("train", ["embedder", "projector", "embedder+lora"])
def test_only_what_the_base_lacks_is_written_and_a_training_goes_on_from_both(
    build: Build, batch_of: MakeBatch, save_llava: Any, save_step: Save, tmp_path: Path, train: str
) -> None:
    save_llava(tmp_path / "base")
    options = {"checkpoint": str(tmp_path / "base"), "train": train, "lora_rank": 2}
    batches = [batch_of(name) for name in ALL]
    one = Training(build(**options))
    one.steps(batches[:3])
    step = save_step(tmp_path / "run", one, 3, **{f"model.{name}": value for name, value in options.items()})
    rest = one.steps(batches[3:])

    assert not (step / "model.safetensors").exists()
    written = load_file(step / "trained.safetensors")
    moving = {n for n, w in one.model.named_parameters() if w.requires_grad and ".lora_" not in n}
    embedder = {n for n, _ in one.model.named_parameters() if "embeddings.by_modality" in n}  # no base has it
    assert written.keys() == moving | embedder
    assert (step / "adapter").exists() == ("lora" in train)
    other = Training(build(seed=1, **options))
    other.restored(step, parameters_to_save(other.model, ModelSettings(**options)))
    assert other.steps(batches[3:]) == rest


def test_a_checkpoint_of_other_weights_is_refused(build: Build, save_step: Save, tmp_path: Path) -> None:
    step = save_step(tmp_path, Training(build()), 3)
    wider = Training(build(width=32))
    with pytest.raises(UserError, match=r"model\.safetensors: does not fit: .* is of shape .*, the model has one of"):
        wider.restored(step, [])
    adapted = Training(build(train="embedder+lora", lora_rank=2))
    with pytest.raises(UserError, match=r"does not fit: it lacks 28 weights, base_model\.model\..*lora_A.* among them"):
        adapted.restored(step, parameters_to_save(adapted.model, ModelSettings()))


def test_every_file_is_text_or_holds_nothing_but_tensors_and_numbers(
    build: Build, batch_of: MakeBatch, save_step: Save, tmp_path: Path
) -> None:
    training = Training(build())
    training.steps([batch_of("two")])
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


def test_random_numbers_go_on_for_each_worker_that_was_there(build: Build, save_step: Save, tmp_path: Path) -> None:
    one, states, following = Training(build()), [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.rand(3)
        states.append(rng_state())
        following.append(torch.rand(3))
    step = save_step(tmp_path, one, 3, rng=states)
    for rank in (0, 1):
        torch.manual_seed(0)
        one.restored(step, [], rank)
        assert torch.equal(torch.rand(3), following[rank])
    torch.manual_seed(7)
    one.restored(step, [], 2)
    assert torch.equal(torch.rand(3), torch.manual_seed(7) and torch.rand(3))


def test_a_checkpoint_says_which_code_wrote_it(build: Build, save_step: Save, tmp_path: Path) -> None:
    step = save_step(tmp_path, Training(build()), 3)
    written = {"git.commit": "abc", "torch": "1", "umbrella": __version__}
    assert json.loads((step / "code.json").read_text()) == written
    assert describe_code_changes(step, written | {"torch": "2"}) == "torch was 1 and is 2"
    now = code_versions({"git.commit": "abc"})
    assert describe_code_changes(step, now | {"torch": "1"}).count(" was unknown and is ") == len(now) - 3
    assert now.keys() >= {"git.commit", "umbrella", "torch", "transformers", "ray", "python"}


def test_a_snapshot_is_of_its_step_while_the_next_ones_are_taken(build: Build, batch_of: MakeBatch) -> None:
    batches = [batch_of(name) for name in ALL]
    one = Training(build())
    one.steps(batches[:2])

    def taken() -> Any:
        names = [name for name, _ in one.model.named_parameters()]
        return snapshot(copy_weights(one.model, names), one.optimizer, one.schedule, TrainingState(2, 8))

    def content(of: Any) -> list[bytes]:
        files = [BytesIO() for _ in range(3)]
        for part, file in zip((of.weights, of.optimizer, of.schedule), files, strict=True):
            torch.save(part, file)
        return [file.getvalue() for file in files]

    first = taken()
    before = content(first)
    one.steps(batches[2:])
    assert content(first) == before
    assert all(then != now for then, now in zip(before, content(taken()), strict=True))


@pytest.fixture
def writer(build: Build, tokenizer: Any, tmp_path: Path) -> tuple[CheckpointWriter, Callable[..., Any]]:
    """A writer to a folder, and snapshots for it."""
    one, settings = Training(build()), load_settings(overrides={"resources.keep_checkpoints": 1})
    names = parameters_to_save(one.model, settings.model)

    def take(step: int, **metrics: float) -> Any:
        measured = {f"eval/{name}": value for name, value in metrics.items()}
        return snapshot(
            copy_weights(one.model, names), one.optimizer, one.schedule, TrainingState(step, 4 * step), measured
        )

    (tmp_path / "run").mkdir()
    return make_writer(tmp_path / "run", one.model, tokenizer, settings), take


def test_the_best_stays_until_a_better_one_is_whole(writer: Any, tmp_path: Path) -> None:
    write, take = writer
    there = []
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.6), (4, 0.7), (5, 0.95)):
        write.write(take(step, balanced_accuracy=accuracy))
        write.wait()
        there.append([int(path.name[-1]) for path in sorted((tmp_path / "run").iterdir())])
    assert there == [[1], [2], [2, 3], [2, 4], [5]]


def test_a_full_disk_leaves_nothing_of_a_checkpoint_and_is_told_at_the_next_chance(
    writer: Any, tmp_path: Path, small_disk: Callable[..., Path]
) -> None:
    write, take = writer
    write.write(take(1))
    write.wait()
    sizes = [file.stat().st_size for file in (tmp_path / "run" / "step_0000001").iterdir()]
    size = sum(-(-size // 4096) * 4096 for size in sizes)
    disk = small_disk(size * 5 // 2)
    write.folder = disk
    for step, metric in ((1, 1.0), (2, 0.0)):  # the second cannot take the place of the best, and a third has no room
        write.write(take(step, balanced_accuracy=metric))
    write.write(take(3, balanced_accuracy=0.0))
    with pytest.raises(UserError, match="step_0000003 could not be written: No space left on device"):
        write.write(take(4))
    assert [path.name for path in sorted(disk.iterdir())] == ["step_0000001", "step_0000002"]
    assert latest_checkpoint(disk) == disk / "step_0000002"
    write.wait()  # told once


def test_a_folder_that_vanished_is_not_made_again(writer: Any, tmp_path: Path) -> None:
    write, take = writer
    os.rename(tmp_path / "run", tmp_path / "elsewhere")
    write.write(take(1))
    with pytest.raises(UserError, match=r"run/step_0000001 could not be written: .*run is gone: No such file"):
        write.wait()
    assert not (tmp_path / "run").exists()


def test_an_error_that_is_no_disks_fault_is_raised_as_it_is(writer: Any, tmp_path: Path) -> None:
    write, take = writer

    def broken(*_: Any) -> None:
        raise TypeError("a mistake in the code")

    write.save_weights = broken
    write.write(take(1))
    with pytest.raises(TypeError, match="a mistake in the code"):
        write.wait()
    assert list((tmp_path / "run").iterdir()) == []


def test_what_a_killed_process_left_is_cleaned_away(build: Build, save_step: Save, writer: Any, tmp_path: Path) -> None:
    (tmp_path / "run" / ".step_0000002.partial").mkdir()
    (tmp_path / "run" / ".step_0000001.deleted").mkdir()
    assert latest_checkpoint(tmp_path / "run") is None
    save_step(tmp_path / "run", Training(build()), 2)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_0000002"]
