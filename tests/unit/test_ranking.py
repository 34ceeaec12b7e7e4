"""The ranking: settings by their mean over seeds, nothing dropped in silence."""

import csv
from pathlib import Path

import pytest
from rich.console import Console

from umbrella.training.progress_log import FINISHED
from umbrella.tuning.results import (
    Evaluation,
    Trial,
    format_interval,
    rank_configurations,
    ranked_trials,
    ranking_table,
    write_ranking,
)
from umbrella.tuning.sweep_files import FAILED, STOPPED

METRIC = "eval/balanced_accuracy"


def seeds(lr: float, *metrics: float | None, state: str = FINISHED) -> list[Trial]:
    """A trial per seed; one without a metric failed."""
    return [
        Trial(f"{lr}/{seed}", {"optim.lr": lr, "seed": seed}, FAILED if m is None else state, m, 0.5, 30, "/c")
        for seed, m in enumerate(metrics)
    ]


def test_settings_are_ranked_by_their_mean_over_seeds() -> None:
    lucky, steady = seeds(0.1, 0.5, 1.0, 0.6), seeds(0.2, 0.79, 0.8, 0.81)
    configurations = rank_configurations([t for pair in zip(lucky, steady, strict=True) for t in pair], "max")
    assert [c.name for c in configurations] == ["lr=0.2", "lr=0.1"]
    assert [c.mean for c in configurations] == pytest.approx([0.8, 0.7])
    assert ranked_trials(configurations)[0].metric == 0.81  # the best seed of the best, not the best trial
    assert [c.name for c in rank_configurations([*lucky, *steady], "min")] == ["lr=0.1", "lr=0.2"]


def test_the_interval_is_students_and_one_seed_has_none() -> None:
    three, one = rank_configurations([*seeds(0.1, 0.79, 0.80, 0.81), *seeds(0.2, 0.5)], "max")
    # t of 0.975 with 2 degrees of freedom is 4.3027 in any table; the standard error is 0.01 / sqrt(3).
    assert three.ci95 == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert format_interval(three) == "0.8 ± 0.025 (n = 3)"
    assert one.ci95 is None
    assert format_interval(one) == "0.5 (n = 1)"


def test_failed_and_stopped_seeds_are_counted_and_a_mostly_failing_setting_comes_last() -> None:
    frail, sound = seeds(0.1, 0.99, None, None), seeds(0.2, 0.7, None, 0.8, 0.6)
    cut = seeds(0.3, 0.65, state=STOPPED)
    configurations = rank_configurations([*frail, *sound, *cut], "max")
    assert [c.name for c in configurations] == ["lr=0.2", "lr=0.3", "lr=0.1"]
    assert [c.state_counts for c in configurations] == ["3 finished, 1 failed", f"1 {STOPPED}", "2 failed, 1 finished"]
    assert [len(c.metrics) for c in configurations] == [3, 1, 1]
    assert len(ranked_trials(configurations)) == 8


def test_a_failed_trials_metric_is_no_part_of_the_mean() -> None:
    before = Trial("t", {"optim.lr": 0.1, "seed": 9}, FAILED, 0.1, 9.0, 10, "/c")
    [configuration] = rank_configurations([*seeds(0.1, 0.7, 0.8), before], "max")
    assert configuration.mean == pytest.approx(0.75)
    assert configuration.loss == 0.5
    assert configuration.trials[-1] is before


def test_points_that_lack_a_setting_are_other_contenders_and_have_an_empty_cell(tmp_path: Path) -> None:
    curve = (Evaluation(30, 1.0, 0.9, 0.1, 0.1, "/c/1"),)
    trials = [
        Trial(
            "t1", {"model.train": "lora", "model.lora_rank": 8}, FINISHED, 0.9, 0.1, 30, "/c/1", "", curve, None, 60.0
        ),
        Trial("t2", {"model.train": "all"}, FINISHED, 0.8, 0.2, 30, "/c/2"),
        Trial("t3", {"optim.lr": 0.1, "model.train": "all"}, FAILED, reason="it broke"),
    ]
    write_ranking(rank_configurations(trials, "max"), METRIC, tmp_path / "ranking.csv")
    with (tmp_path / "ranking.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["t1", "t2", "t3"]
    assert [row["model.lora_rank"] for row in rows] == ["8", "", ""]
    assert [row["optim.lr"] for row in rows] == ["", "", "0.1"]
    assert rows[0] == {
        "rank": "1",
        "trial": "t1",
        "model.train": "lora",
        "model.lora_rank": "8",
        "optim.lr": "",
        "state": "finished",
        "reason": "",
        "step": "30",
        "evaluations": "1",
        "eval/loss": "0.1",
        METRIC: "0.9",
        "mean": "0.9",
        "ci95": "",
        "seeds": "1",
        "seconds": "60.0",
        "checkpoint": "/c/1",
    }
    assert (rows[2]["reason"], rows[2][METRIC], rows[2]["seeds"]) == ("it broke", "", "0")


@pytest.mark.parametrize("with_seeds", [False, True])
def test_the_terminal_shows_settings_where_there_are_seeds_and_else_trials(tmp_path: Path, with_seeds: bool) -> None:
    trials = [*seeds(0.1, 0.8), *seeds(0.2, 0.7)] if not with_seeds else [*seeds(0.1, 0.8, 0.9), *seeds(0.2, 0.7, None)]
    console = Console(width=150, record=True, file=(tmp_path / "log").open("w", encoding="utf-8"))
    console.print(ranking_table(rank_configurations(trials, "max"), METRIC))
    lines = [line for line in console.export_text().splitlines() if "lr=" in line]
    assert [line.split()[1] for line in lines] == ["lr=0.1", "lr=0.2"]
    if with_seeds:
        assert "0.85 ± 0.64 (n = 2)" in lines[0]
        assert "1 finished, 1 failed" in lines[1]
