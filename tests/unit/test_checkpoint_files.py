"""Which checkpoint a training goes on from, and which ones are kept."""

import json
from collections.abc import Callable
from math import inf, nan
from pathlib import Path

import pytest

from umbrella.training.checkpoint_files import best_checkpoint, latest_checkpoint, mark_complete, prune, read_metrics
from umbrella.training.training_state import TrainingState, read_training_state

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A whole checkpoint of a step, with files of a few bytes."""

    def make(step: int, **metrics: float) -> Path:
        folder = tmp_path / f"step_{step:07d}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"0123456789")
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"01234")
        (folder / "progress.json").write_text(f'{{"step": {step}, "position": {8 * step}, "sorted_by": 8}}')
        (folder / "metrics.json").write_text(json.dumps({f"eval/{name}": value for name, value in metrics.items()}))
        mark_complete(folder)
        return folder

    return make


def test_a_training_goes_on_from_its_newest_checkpoint(make: Make, tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nothing yet") is None
    make(20)
    make(5)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_0000020"
    assert read_training_state(tmp_path / "step_0000020") == TrainingState(20, 160, 8)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("model.safetensors", "model.safetensors has 9 bytes instead of 10"),
        ("adapter/adapter_model.safetensors", "adapter_model.safetensors has 4 bytes instead of 5"),
        ("files.json", "files.json cannot be read: "),
    ],
)
def test_one_that_was_cut_short_is_named_and_the_one_before_is_taken(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture, broken: str, message: str
) -> None:
    make(5)
    newer = make(10)
    (newer / broken).write_bytes((newer / broken).read_bytes()[:-1])
    assert latest_checkpoint(tmp_path) == tmp_path / "step_0000005"
    said = capsys.readouterr().err
    assert said.startswith(f"note: {newer} cannot be used: ")
    assert message in said


def test_one_without_a_file_or_a_list_of_them_is_not_taken(make: Make, tmp_path: Path) -> None:
    (make(10) / "adapter" / "adapter_model.safetensors").unlink()
    (make(11) / "files.json").unlink()
    (tmp_path / ".step_0000012.partial").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_the_newest_and_the_best_are_kept(make: Make, tmp_path: Path) -> None:
    scores = {1: (0.5, 2.0), 2: (0.9, 1.5), 3: (0.9, 1.0), 4: (nan, 0.1), 5: (0.7, 1.0), 6: (0.6, 1.0)}
    for step, (accuracy, loss) in scores.items():
        make(step, accuracy=accuracy, loss=loss)
    (make(7) / "model.safetensors").unlink()  # what is broken is not touched: somebody may want to look at it

    def kept() -> list[int]:
        return sorted(int(path.name.removeprefix("step_")) for path in tmp_path.glob("step_*"))

    best = best_checkpoint(tmp_path, "eval/accuracy", "max")
    assert best == tmp_path / "step_0000003"
    assert read_metrics(best) == {"eval/accuracy": 0.9, "eval/loss": 1.0}
    prune(tmp_path, 2, "eval/accuracy", "max")
    assert kept() == [3, 5, 6, 7]
    prune(tmp_path, 1, "eval/accuracy", "min")
    assert kept() == [6, 7]


@pytest.mark.parametrize(
    ("mode", "values", "since_best"),
    [
        ("max", [0.5, 0.6, 0.6, 0.5, 0.7, nan, 0.7], [0, 0, 1, 2, 0, 1, 2]),
        ("min", [2.0, 1.0, 1.5, 0.0, -1.0, inf], [0, 0, 1, 0, 0, 1]),
        ("max", [nan, nan, -inf, nan], [1, 2, 0, 1]),
    ],
)
def test_patience_counts_evaluations_that_are_not_better_and_nan_never_is(
    mode: str, values: list[float], since_best: list[int]
) -> None:
    progress, counted = TrainingState(3, 12, 4), []
    for value in values:
        progress = progress.evaluated(value, mode)
        counted.append(progress.since_best)
        assert progress.out_of_patience(2) == (counted[-1] >= 2)
        assert not progress.out_of_patience(0)
    assert counted == since_best
    assert (progress.step, progress.position, progress.sorted_by) == (3, 12, 4)


def test_one_that_was_not_evaluated_is_kept_as_the_newest_and_never_as_the_best(make: Make, tmp_path: Path) -> None:
    def kept_after(step: int, **metrics: float) -> list[int]:
        make(step, **metrics)
        prune(tmp_path, 1, "eval/accuracy", "max")
        return sorted(int(path.name.removeprefix("step_")) for path in tmp_path.glob("step_*"))

    assert kept_after(3) == [3]
    assert kept_after(4) == [4]
    assert kept_after(5, accuracy=0.5) == [5]
    assert kept_after(7) == [5, 7]
    assert kept_after(10, accuracy=0.4) == [5, 10]
