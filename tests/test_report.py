"""The answer of a sweep: the order of its trials, the table of them, and the figure."""

import csv
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image
from ray.tune import Result
from rich.console import Console

from umbrella.training.live import EARLY, FINISHED
from umbrella.training.progress import write_files
from umbrella.tuning.monitor import FAILED, STOPPED
from umbrella.tuning.report import Trial, draw, rank, ranking_table, write_csv

METRIC = "eval/balanced_accuracy"
Evaluation = tuple[int, float, float, bool]
"""(step of 30, metric, validation loss, whether the checkpoint was kept)."""


def result(
    folder: Path, number: int, evaluations: list[Evaluation], out_of_patience: bool = False, **others: Any
) -> Result:
    """What Ray Tune hands back about a trial, with the checkpoint folders that it kept."""
    rows = []
    for step, metric, loss, kept in evaluations:
        checkpoint = folder / f"{number}" / f"step_{step}"
        checkpoint.mkdir(parents=True)
        if kept:
            write_files(checkpoint)  # the others were never whole
        row = {"step": step, "steps": 30, METRIC: metric, "eval/loss": loss, "checkpoint": str(checkpoint)}
        rows.append(row | {"out_of_patience": out_of_patience})
    said = {"trial_id": f"a8_{number:05d}", "config": {"optim.lr": 10.0**-number}}
    frame = pd.DataFrame(rows) if rows else None
    return Result(metrics=said, checkpoint=None, path=str(folder), metrics_dataframe=frame, **{"error": None} | others)


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
    trials = rank(results, METRIC, "max")
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
    assert trials[0].checkpoint == str(tmp_path / "3" / "step_10")
    assert trials[0].name == "lr=0.001"
    by_loss = rank(results, "eval/loss", "min")
    assert [(t.trial_id[-1], t.metric) for t in by_loss[:3]] == [("3", 0.1), ("2", 0.2), ("1", 0.5)]


def test_a_trial_out_of_patience_is_told_apart_from_one_that_asha_stopped(tmp_path: Path) -> None:
    ends = [
        result(tmp_path, 1, [(10, 0.8, 1.0, True), (20, 0.8, 1.0, True)]),
        result(tmp_path, 2, [(10, 0.7, 1.0, True), (20, 0.7, 1.0, True)], out_of_patience=True),
        result(tmp_path, 3, [(10, 0.6, 1.0, True), (30, 0.6, 1.0, True)], out_of_patience=True),
    ]
    assert [t.state for t in rank(ends, METRIC, "max")] == [STOPPED, EARLY, FINISHED]
    assert len({STOPPED, EARLY, FINISHED}) == 3


def test_a_trial_whose_process_died_at_once_still_has_its_point(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"optim.lr": 0.25}', encoding="utf-8")
    dead = Result(metrics={"trial_id": "a8_00000"}, checkpoint=None, path=str(tmp_path), error=RuntimeError("killed"))
    assert rank([dead], METRIC, "max") == [Trial("a8_00000", {"optim.lr": 0.25}, FAILED)]


TRIALS = [
    Trial("t1", {"optim.lr": 0.001, "mask.supervise": "all"}, FINISHED, 0.9, 0.1, 30, "/c/1"),
    Trial("t2", {"optim.lr": 0.01, "mask.supervise": "all"}, STOPPED, 0.6, 0.7, 20, "/c/2"),
    Trial("t3", {"optim.lr": 0.1, "mask.supervise": "all"}, STOPPED, 0.5, 0.8, 10, "/c/3"),
    Trial("t4", {"optim.lr": 0.001, "mask.supervise": "last_assistant"}, FINISHED, 0.8, 0.3, 30, "/c/4"),
    Trial("t5", {"optim.lr": 0.01, "mask.supervise": "last_assistant"}, FINISHED, 0.7, 0.4, 30, "/c/5"),
    Trial("t6", {"optim.lr": 0.1, "mask.supervise": "last_assistant"}, FAILED),
]


def test_the_table_and_the_csv_hold_one_row_per_trial(tmp_path: Path) -> None:
    write_csv([TRIALS[0], TRIALS[5]], METRIC, tmp_path / "ranking.csv")
    with (tmp_path / "ranking.csv").open(encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["trial", "optim.lr", "mask.supervise", "state", "step", "eval/loss", METRIC, "checkpoint"],
            ["t1", "0.001", "all", "finished", "30", "0.1", "0.9", "/c/1"],
            ["t6", "0.1", "last_assistant", "failed", "", "", "", ""],
        ]
    console = Console(width=150, record=True, file=(tmp_path / "log").open("w", encoding="utf-8"))
    console.print(ranking_table(TRIALS, METRIC))
    lines = console.export_text().splitlines()
    assert [line.split()[1] for line in lines if "lr=" in line] == [t.name.split()[0] for t in TRIALS]


def test_the_figure_has_a_line_per_policy_over_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plt, "close", lambda figure: None)  # to look into it
    draw(TRIALS, METRIC, tmp_path / "metric.png")
    [axes] = plt.gcf().axes
    monkeypatch.undo()
    lines = {line.get_label(): line for line in axes.lines if line.get_linestyle() == "-"}
    assert list(lines) == ["supervise=all", "supervise=last_assistant"]
    assert [text.get_text() for text in axes.get_legend().texts] == list(lines)
    assert lines["supervise=all"].get_xydata().tolist() == [[0.001, 0.9], [0.01, 0.6], [0.1, 0.5]]
    assert lines["supervise=last_assistant"].get_xydata().tolist() == [[0.001, 0.8], [0.01, 0.7]]
    hollow = [line.get_ydata()[0] for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert hollow == [0.6, 0.5]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "optim.lr", METRIC)
    plt.close("all")
    with Image.open(tmp_path / "metric.png") as image:
        assert image.size == (840, 540)
        assert len(set(image.convert("RGB").getdata())) > 50


@pytest.mark.parametrize(
    "points",
    [
        [{"optim.lr": 0.001}, {"optim.lr": 0.01}],
        [{"mask.supervise": "all"}, {"mask.supervise": "last_assistant"}],
        [{"mask.supervise": "all", "mask.end_of_turn": True}, {"mask.supervise": "all", "mask.end_of_turn": False}],
        [{"modalities.sMRI.grid": [8, 8, 8]}, {"modalities.sMRI.grid": [16, 16, 16]}],
        [{"seed": 0}, {"seed": 0}],
        [{}, {}],
    ],
)
def test_any_space_and_failed_trials_can_be_drawn(tmp_path: Path, points: list[dict]) -> None:
    trials = [Trial(f"t{i}", point, FINISHED, 0.5 + 0.1 * i, 0.5, 30, "/c") for i, point in enumerate(points)]
    draw([*trials, Trial("dead", points[0], FAILED)], METRIC, tmp_path / "metric.png")
    assert (tmp_path / "metric.png").stat().st_size > 5000
