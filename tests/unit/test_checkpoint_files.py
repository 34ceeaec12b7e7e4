"""Which checkpoint a training continues from, which ones are kept, and when a training is out of patience."""

import json
from collections.abc import Callable
from math import inf, nan
from pathlib import Path

import pytest

from umbrella.paths import checkpoints_in
from umbrella.training.checkpoint_files import (
    TrainingState,
    best_checkpoint,
    latest_checkpoint,
    mark_complete,
    prune,
    read_metrics,
    read_training_state,
)

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A complete checkpoint of a step, with files of a few bytes."""

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


def kept(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoints_in(folder)]


@pytest.mark.parametrize(
    ("broken", "content", "message"),
    [
        ("model.safetensors", b"012345678", "model.safetensors has 9 bytes instead of 10"),
        ("adapter/adapter_model.safetensors", None, "adapter/adapter_model.safetensors is missing"),
        ("files.json", b"{", "files.json cannot be read: "),
        ("files.json", None, "files.json cannot be read: No such file"),
    ],
)
def test_a_training_continues_from_the_newest_complete_checkpoint_and_names_damaged_ones(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture, broken: str, content: bytes | None, message: str
) -> None:
    assert latest_checkpoint(tmp_path / "nothing yet") is None
    newer = make(20)
    (tmp_path / ".step_0000022.partial").mkdir()
    assert latest_checkpoint(tmp_path) == newer
    assert read_training_state(newer) == TrainingState(20, 160, 8)
    (newer / broken).unlink()
    if content:
        (newer / broken).write_bytes(content)
    assert latest_checkpoint(tmp_path) is None
    older = make(5)
    assert latest_checkpoint(tmp_path) == older
    notes = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"note: {newer} cannot be used: {message}") for line in notes] == [True, True]
    assert notes[0].endswith("; the training continues from its start")
    assert notes[1].endswith(f"; the training continues from {older}")


def test_the_newest_checkpoints_and_the_best_are_kept(make: Make, tmp_path: Path) -> None:
    scores = {1: (0.5, 2.0), 2: (0.9, 1.5), 3: (0.9, 1.0), 4: (nan, 0.1), 5: (0.7, 1.0), 6: (0.6, 1.0)}
    for step, (accuracy, loss) in scores.items():
        make(step, accuracy=accuracy, loss=loss)
    (make(7) / "model.safetensors").unlink()  # a damaged one is not deleted: somebody may want to look at it
    best = best_checkpoint(tmp_path, "eval/accuracy", "max")
    assert best == tmp_path / "step_0000003"
    assert read_metrics(best) == {"eval/accuracy": 0.9, "eval/loss": 1.0}
    prune(tmp_path, 2, "eval/accuracy", "max")
    assert kept(tmp_path) == [3, 5, 6, 7]
    prune(tmp_path, 1, "eval/accuracy", "min")
    assert kept(tmp_path) == [6, 7]


def test_a_checkpoint_without_evaluation_is_kept_only_as_the_newest(make: Make, tmp_path: Path) -> None:
    found = []
    for step, metrics in ((3, {}), (4, {}), (5, {"accuracy": 0.5}), (7, {}), (10, {"accuracy": 0.4})):
        make(step, **metrics)
        prune(tmp_path, 1, "eval/accuracy", "max")
        found.append(kept(tmp_path))
    assert found == [[3], [4], [5], [5, 7], [5, 10]]


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
    state, counted = TrainingState(3, 12, 4), []
    for value in values:
        state = state.evaluated(value, mode)
        counted.append(state.since_best)
        assert state.out_of_patience(2) == (counted[-1] >= 2)
        assert not state.out_of_patience(0)
    assert counted == since_best
    assert (state.step, state.position, state.sorted_by) == (3, 12, 4)
