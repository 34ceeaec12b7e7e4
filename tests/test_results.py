"""What is read of each trial: its end, its best kept checkpoint, its curve, its times."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ray.exceptions import RayTaskError
from ray.tune import Result

from umbrella.base import UserError
from umbrella.training.live import EARLY, FINISHED
from umbrella.training.progress import Progress, write_files
from umbrella.tuning.ending import FAILED, STOPPED
from umbrella.tuning.ranking import rank, trials_of
from umbrella.tuning.results import Trial, read_trials
from umbrella.tuning.settings import TuneSettings

METRIC = "eval/balanced_accuracy"
Evaluation = tuple[int, float, float, bool]
"""(step of 30, metric, validation loss, whether the checkpoint was kept)."""


def result(
    folder: Path,
    number: int,
    evaluations: list[Evaluation],
    out_of_patience: bool = False,
    columns: dict[str, list] | None = None,
    **others: Any,
) -> Result:
    """What Ray Tune hands back about a trial, with the checkpoint folders that it kept. ``columns``: more of them."""
    rows = []
    for step, metric, loss, kept in evaluations:
        checkpoint = folder / f"{number}" / f"step_{step}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        if kept:
            write_files(checkpoint)  # the others were never whole
        row = {"step": step, "steps": 30, METRIC: metric, "eval/loss": loss, "checkpoint": str(checkpoint)}
        rows.append(row | {"out_of_patience": out_of_patience})
    said = {"trial_id": f"a8_{number:05d}", "config": {"optim.lr": 10.0**-number}}
    frame = pd.DataFrame(rows).assign(**columns or {}) if rows else None
    return Result(metrics=said, checkpoint=None, path=str(folder), metrics_dataframe=frame, **{"error": None} | others)


def read(results: list[Result], metric: str = METRIC, mode: Any = "max", **others: Any) -> list[Trial]:
    return read_trials(results, TuneSettings(metric=metric, mode=mode), **others)


def test_trials_rank_by_the_metric_then_by_the_loss_and_failed_ones_last(tmp_path: Path) -> None:
    nan = float("nan")
    results = [
        result(tmp_path, 0, [], error=RuntimeError("before its first evaluation")),
        result(tmp_path, 1, [(10, 0.8, 1.0, True), (20, 0.6, 0.5, True)]),
        result(tmp_path, 2, [(10, 0.9, 0.3, False), (20, 0.7, 0.4, True), (30, 0.7, 0.2, True)]),
        result(tmp_path, 3, [(10, 0.8, 0.9, True), (30, 0.5, 0.1, True)]),
        result(tmp_path, 4, [(10, 0.99, 0.1, True)], error=RuntimeError("later")),
        result(tmp_path, 5, [(10, nan, nan, True), (30, 0.6, nan, True)]),
        result(tmp_path, 6, [(10, 0.9, 0.1, False)]),
    ]
    trials = trials_of(rank(read(results), "max"))
    assert [(t.trial_id[-1], t.state, t.step, t.metric, t.loss) for t in trials[:3]] == [
        ("3", FINISHED, 10, 0.8, 0.9),
        ("1", STOPPED, 10, 0.8, 1.0),
        ("2", FINISHED, 30, 0.7, 0.2),  # its 0.9 has no checkpoint left
    ]
    assert [(t.trial_id[-1], t.state, t.step) for t in trials[3:]] == [
        ("5", FINISHED, 30),
        ("6", STOPPED, None),  # stopped before its only checkpoint was whole
        ("0", FAILED, None),
        ("4", FAILED, 10),
    ]
    assert trials[0].checkpoint == str(tmp_path / "3" / "step_10")
    assert trials[0].name == "lr=0.001"
    by_loss = trials_of(rank(read(results, "eval/loss", "min"), "min"))
    assert [(t.trial_id[-1], t.metric) for t in by_loss[:3]] == [("3", 0.1), ("2", 0.2), ("1", 0.5)]


def test_a_trial_out_of_patience_is_told_apart_from_one_that_the_scheduler_stopped(tmp_path: Path) -> None:
    ends = [
        result(tmp_path, 1, [(10, 0.8, 1.0, True), (20, 0.8, 1.0, True)]),
        result(tmp_path, 2, [(10, 0.7, 1.0, True), (20, 0.7, 1.0, True)], out_of_patience=True),
        result(tmp_path, 3, [(10, 0.6, 1.0, True), (30, 0.6, 1.0, True)], out_of_patience=True),
    ]
    trials = read(ends)
    assert [t.state for t in trials] == [STOPPED, EARLY, FINISHED]
    assert len({STOPPED, EARLY, FINISHED}) == 3
    assert trials[0].reason == "at evaluation 2, step 20 of 30"
    assert "train.patience" in trials[1].reason
    assert trials[2].reason == ""


def test_what_the_driver_knows_of_an_end_goes_before_the_last_report(tmp_path: Path) -> None:
    told = {"a8_00001": ("stopped", "the budget of 2 hours was over")}
    ends = read([result(tmp_path, i, [(10, 0.8, 1.0, True)]) for i in (1, 2)], told=told)
    assert [(t.state, t.reason) for t in ends] == [told["a8_00001"], (STOPPED, "at evaluation 1, step 10 of 30")]
    assert [t.metric for t in ends] == [0.8, 0.8]


def test_a_failed_trial_says_why_in_one_line(tmp_path: Path) -> None:
    why = "the training stopped: at step 17 the loss is NaN"
    try:
        raise UserError(why)
    except UserError as error:
        raised = RayTaskError(
            "run", 'Traceback:\n  File "a.py", line 1, in run\n' + f"umbrella.base.UserError: {why}", error
        )
    silent = Result(metrics={"config": {}}, checkpoint=None, path=str(tmp_path / "t"), error=None)
    trials = read([result(tmp_path, 1, [], error=raised), silent])
    assert [(t.state, t.reason) for t in trials] == [(FAILED, why), (FAILED, "it ended before its first evaluation")]
    assert trials[1].trial_id == "t"


def test_a_trial_whose_process_died_at_once_still_has_its_point(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"optim.lr": 0.25}', encoding="utf-8")
    dead = Result(metrics={"trial_id": "a8_00000"}, checkpoint=None, path=str(tmp_path), error=RuntimeError("killed"))
    assert read([dead]) == [Trial("a8_00000", {"optim.lr": 0.25}, FAILED, reason="RuntimeError: killed")]


def test_after_a_restart_the_curve_has_each_step_once_and_no_gap(tmp_path: Path) -> None:
    lost = tmp_path / "1" / "step_15"  # Ray lost its report; what was measured lies in the checkpoint
    asked = tmp_path / "1" / "step_17"  # written on request, without an evaluation
    for folder, step, metrics in ((lost, 15, {METRIC: 0.9, "eval/loss": 0.3}), (asked, 17, {"train/waiting": 0.1})):
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text(json.dumps(asdict(Progress(step=step, epoch=1.5))), encoding="utf-8")
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        write_files(folder)
    rows = [(10, 0.5, 0.9, False), (20, 0.6, 0.8, False), (20, 0.7, 0.7, False), (30, 0.8, float("inf"), True)]
    columns = {
        "train/loss": [4.0, 3.0, 2.0, 1.0],
        "epoch": [1.0, 2.0, 2.0, 3.0],
        "time_total_s": [40.0, 50.0, 30.0, 45.0],
        "timestamp": [1000, 1010, 1100, 1115],
    }
    [trial] = read([result(tmp_path, 1, rows, columns=columns)])
    assert [(e.step, e.epoch, e.metric, e.loss, e.train_loss) for e in trial.curve] == [
        (10, 1.0, 0.5, 0.9, 4.0),
        (15, 1.5, 0.9, 0.3, None),
        (20, 2.0, 0.7, 0.7, 2.0),
        (30, 3.0, 0.8, None, 1.0),
    ]
    assert (trial.step, trial.metric, trial.checkpoint) == (15, 0.9, str(lost))
    # Two attempts of 50 and 45 seconds.
    assert (trial.started, trial.first, trial.seconds) == (960.0, 40.0, 95.0)


@pytest.mark.parametrize("column", ["time_total_s", "timestamp"])
def test_unknown_times_stay_unknown(tmp_path: Path, column: str) -> None:
    [trial] = read([result(tmp_path, 1, [(30, 0.5, 0.5, True)], columns={column: [7.0]})])
    assert trial.started is None
    assert trial.seconds == (7.0 if column == "time_total_s" else None)
