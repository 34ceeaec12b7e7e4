"""What is read of each trial: its end, its best kept checkpoint, its curve, its times."""

import json
from pathlib import Path
from typing import Any

import pytest

from umbrella.paths import HISTORY, METRICS, POINT
from umbrella.training.checkpoint_files import mark_complete
from umbrella.training.progress_log import FINISHED, STOPPED_EARLY
from umbrella.tuning.results import Trial, chance_warning, rank_configurations, ranked_trials, read_trials
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.sweep_files import (
    FAILED,
    STOPPED,
    UNFINISHED,
    allow_retry,
    load_outcome,
    make_trial_folder,
    save_outcome,
)

METRIC = "eval/balanced_accuracy"
Evaluation = tuple[int, float, float, bool]
"""(step of 30, metric, validation loss, whether the checkpoint was kept)."""


def left(sweep: Path, number: int, evaluations: list[Evaluation], end: str = "", reason: str = "", **more: Any) -> Path:
    """A trial's folder as a training leaves it. ``more``: lists of what else the evaluations say."""
    folder = sweep / "trials" / str(number)
    folder.mkdir(parents=True)
    (folder / POINT).write_text(json.dumps({"optim.lr": 10.0**-number}), encoding="utf-8")
    lines = []
    for i, (step, metric, loss, kept) in enumerate(evaluations):
        checkpoint = folder / f"step_{step:07d}"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / METRICS).write_text(json.dumps({METRIC: metric, "eval/loss": loss}), encoding="utf-8")
        if kept:
            mark_complete(checkpoint)  # the others were never whole
        row = {"step": step, "steps": 30, METRIC: metric, "eval/loss": loss, "begun": 0.0, "time": 10.0 * (i + 1)}
        lines.append(json.dumps(row | {name: values[i] for name, values in more.items()}) + "\n")
    (folder / HISTORY).write_text("".join(lines), encoding="utf-8")
    if end:
        save_outcome(folder, end, reason)
    return folder


def read(sweep: Path, metric: str = METRIC, mode: Any = "max") -> list[Trial]:
    return read_trials(sweep, TuneSettings(metric=metric, mode=mode))


def test_trials_rank_by_the_metric_then_by_the_loss_and_failed_ones_last(tmp_path: Path) -> None:
    nan = float("nan")
    left(tmp_path, 0, [], FAILED)
    left(tmp_path, 1, [(10, 0.8, 1.0, True), (20, 0.6, 0.5, True)], STOPPED)
    left(tmp_path, 2, [(10, 0.9, 0.3, False), (20, 0.7, 0.4, True), (30, 0.7, 0.2, True)], FINISHED)
    left(tmp_path, 3, [(10, 0.8, 0.9, True), (30, 0.5, 0.1, True)], FINISHED)
    left(tmp_path, 4, [(10, 0.99, 0.1, True)], FAILED)
    left(tmp_path, 5, [(10, nan, nan, True), (30, 0.6, nan, True)], FINISHED)
    left(tmp_path, 6, [(10, 0.9, 0.1, False)], STOPPED)
    trials = ranked_trials(rank_configurations(read(tmp_path), "max"))
    assert [(t.trial_id[-1], t.state, t.step, t.metric, t.loss) for t in trials[:3]] == [
        ("3", FINISHED, 10, 0.8, 0.9),
        ("1", STOPPED, 10, 0.8, 1.0),
        ("2", FINISHED, 30, 0.7, 0.2),  # its 0.9 has no checkpoint left
    ]
    assert [(t.trial_id[-1], t.state, t.step) for t in trials[3:]] == [
        ("5", FINISHED, 30),
        ("6", STOPPED, None),  # stopped before its only checkpoint was whole
        ("4", FAILED, 10),
        ("0", FAILED, None),
    ]
    assert trials[0].checkpoint == str(tmp_path / "trials" / "3" / "step_0000010")
    assert trials[0].name == "lr=0.001"
    by_loss = ranked_trials(rank_configurations(read(tmp_path, "eval/loss", "min"), "min"))
    assert [(t.trial_id[-1], t.metric) for t in by_loss[:3]] == [("3", 0.1), ("2", 0.2), ("1", 0.5)]


@pytest.mark.parametrize(
    ("best", "chance", "subjects", "said"),
    [
        (0.5, 0.5, 12, True),
        (0.75, 0.5, 12, True),
        (0.8, 0.5, 12, False),
        (0.75, 0.5, 100, False),
        (0.45, 0.25, 12, True),
        (1.0, 0.5, 2, False),
        (0.5, None, 12, False),
        (None, 0.5, 12, False),
    ],
)
def test_a_sweep_without_a_trial_above_chance_is_told_in_a_sentence(
    best: float | None, chance: float | None, subjects: int, said: bool
) -> None:
    trials = [Trial("a", {}, FINISHED, 0.3), Trial("b", {}, FINISHED, best)] if best else [Trial("c", {}, FAILED)]
    sentence = chance_warning(trials, TuneSettings(), chance, subjects)
    assert bool(sentence) == said
    if said:
        assert sentence.startswith(f"No trial learnt the task: the best eval/balanced_accuracy, {best:.4g}, is not")


def test_how_a_trial_ended_is_what_was_written_first(tmp_path: Path) -> None:
    folder = left(tmp_path, 1, [(10, 0.8, 1.0, True)], STOPPED_EARLY, "train.patience is over, step 10 of 30")
    save_outcome(folder, STOPPED, "by whoever did not know")
    left(tmp_path, 2, [(10, 0.7, 1.0, True)])
    assert [(t.state, t.reason) for t in sorted(read(tmp_path), key=lambda t: t.trial_id)] == [
        (STOPPED_EARLY, "train.patience is over, step 10 of 30"),
        (UNFINISHED, ""),
    ]


def test_a_failed_trial_may_go_on_and_a_stopped_one_may_not(tmp_path: Path) -> None:
    folders = [left(tmp_path, i, [], end) for i, end in enumerate((FAILED, STOPPED, FINISHED))]
    for folder in folders:
        allow_retry(folder)
    assert [end and end.state for end in map(load_outcome, folders)] == [None, STOPPED, FINISHED]


def test_after_a_restart_the_curve_has_each_step_once(tmp_path: Path) -> None:
    rows = [(10, 0.5, 0.9, False), (20, 0.6, 0.8, False), (20, 0.7, 0.7, False), (30, 0.8, float("inf"), True)]
    more = {
        "train/loss": [4.0, 3.0, 2.0, 1.0],
        "epoch": [1.0, 2.0, 2.0, 3.0],
        "begun": [960.0, 960.0, 1070.0, 1070.0],
        "time": [1000.0, 1010.0, 1100.0, 1115.0],
    }
    folder = left(tmp_path, 1, rows, FINISHED, **more)
    with (folder / HISTORY).open("a") as file:
        file.write('{"step": 40, "ste')  # the process was killed as it wrote
    [trial] = read(tmp_path)
    assert [(e.step, e.epoch, e.metric, e.loss, e.train_loss) for e in trial.curve] == [
        (10, 1.0, 0.5, 0.9, 4.0),
        (20, 2.0, 0.7, 0.7, 2.0),
        (30, 3.0, 0.8, None, 1.0),
    ]
    assert (trial.step, trial.metric) == (30, 0.8)
    # Two attempts; of the first one, the time to its last evaluation that was not done again.
    assert (trial.started, trial.first_evaluation, trial.seconds) == (960.0, 40.0, 40.0 + 45.0)


def test_a_trials_folder_is_named_by_the_point_that_it_began_with(tmp_path: Path) -> None:
    first = make_trial_folder(tmp_path, "ray_1", {"optim.lr": 0.1, "seed": 1})
    assert (
        make_trial_folder(tmp_path, "ray_2", {"seed": 1, "optim.lr": 0.1}) == first
    )  # Ray's note of the first was lost
    assert make_trial_folder(tmp_path, "ray_3", {"optim.lr": 0.1, "seed": 2}) != first
    assert make_trial_folder(tmp_path, "ray_1", {"optim.lr": 0.2, "seed": 1}) == first  # changed on the way
    assert json.loads((first / POINT).read_text()) == {"optim.lr": 0.1, "seed": 1}
