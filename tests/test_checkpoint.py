"""A checkpoint: what is put back goes on as if nothing had happened, and no file of it can run code when it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from umbrella.data.batching import Batch
from umbrella.model.selection import parts
from umbrella.training.checkpoint import restore, rng_state, save_checkpoint
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.progress import Progress, latest_checkpoint, read_progress
from umbrella.training.settings import OptimSettings
from umbrella.training.step import StepResult, train_step

OPTIM = OptimSettings(lr=1e-2, warmup=2)
STEPS = 6


class Training:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer = build_optimizer(model, OPTIM)
        self.schedule = build_schedule(self.optimizer, OPTIM, STEPS)

    def steps(self, batches: list[Batch]) -> list[StepResult]:
        return [
            train_step(self.model, [batch], self.optimizer, self.schedule, OPTIM.clip, parts(self.model))
            for batch in batches
        ]


@pytest.mark.parametrize("train", ["all", "embedder+projector"])
def test_a_restored_training_goes_on_to_the_last_bit_like_one_that_was_never_stopped(
    build: Callable[..., Any], batch_of: Callable[..., Batch], tokenizer: Any, tmp_path: Path, train: str
) -> None:
    batches = [batch_of(name) for name in ("two", "three", "none", "three", "two", "none")]
    one = Training(build(train=train))
    one.steps(batches[:3])
    save_checkpoint(tmp_path, one.model, tokenizer, one.optimizer, one.schedule, Progress(3, 12), "seed: 7\n")
    rest = one.steps(batches[3:])

    other = Training(build(seed=1, train=train))
    assert restore(tmp_path, other.model, other.optimizer, other.schedule) == Progress(3, 12)
    assert other.steps(batches[3:]) == rest
    torch.testing.assert_close(other.model.state_dict(), one.model.state_dict(), rtol=0, atol=0)
    moving = [w.requires_grad for w in one.model.parameters()]
    assert [w.requires_grad for w in other.model.parameters()] == moving


def test_every_file_is_text_or_holds_nothing_but_tensors_and_numbers(
    build: Callable[..., Any], batch_of: Callable[..., Batch], tokenizer: Any, tmp_path: Path
) -> None:
    training = Training(build())
    training.steps([batch_of("two")])
    progress = Progress(step=1, position=8)
    save_checkpoint(tmp_path, training.model, tokenizer, training.optimizer, training.schedule, progress, "seed: 7\n")
    for file in tmp_path.iterdir():
        if file.suffix == ".pt":
            torch.load(file, weights_only=True)
        elif file.suffix == ".safetensors":
            load_file(file)
        else:
            assert file.suffix in (".json", ".yaml", ".jinja"), file
            file.read_text(encoding="utf-8")
    assert (tmp_path / "settings.yaml").read_text(encoding="utf-8") == "seed: 7\n"
    assert read_progress(tmp_path) == progress


def test_random_numbers_go_on_for_each_worker_that_was_there(
    build: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    one, states, following = Training(build()), [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.rand(3)
        states.append(rng_state())
        following.append(torch.rand(3))
    arguments = (one.model, tokenizer, one.optimizer, one.schedule, Progress(3, 12), "")
    save_checkpoint(tmp_path / "step", *arguments, rng=states)
    for rank in (0, 1):
        torch.manual_seed(0)
        restore(tmp_path / "step", one.model, one.optimizer, one.schedule, rank)
        assert torch.equal(torch.rand(3), following[rank])
    torch.manual_seed(7)
    restore(tmp_path / "step", one.model, one.optimizer, one.schedule, 2)
    assert torch.equal(torch.rand(3), torch.manual_seed(7) and torch.rand(3))


def test_a_checkpoint_appears_whole_or_not_at_all(
    build: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Training(build())
    arguments = (one.model, tokenizer, one.optimizer, one.schedule, Progress(3, 12), "")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path / "step_0000003", *arguments)
    assert latest_checkpoint(tmp_path) is None
    assert not (tmp_path / "step_0000003").exists()
    save_checkpoint(tmp_path / "step_0000003", *arguments)  # the rest of the first attempt is in nobody's way
    assert latest_checkpoint(tmp_path) == tmp_path / "step_0000003"
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000003"]
