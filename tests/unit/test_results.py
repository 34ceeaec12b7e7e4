"""The trials of a sweep, read from their folders; their ranking; and the importance of the settings."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from umbrella.base import UserError
from umbrella.cli import named_checkpoint
from umbrella.config import load_settings
from umbrella.paths import HISTORY, METRICS, POINT, SETTINGS
from umbrella.training.checkpoint_files import mark_complete
from umbrella.training.progress_log import FINISHED, STOPPED_EARLY
from umbrella.tuning.results import (
    MIN_TRIALS,
    Trial,
    chance_warning,
    compute_importance,
    format_interval,
    rank_configurations,
    ranked_trials,
    read_trials,
    write_ranking,
)
from umbrella.tuning.settings import TuneSettings
from umbrella.tuning.sweep_files import (
    FAILED,
    STOPPED,
    UNFINISHED,
    allow_retry,
    make_trial_folder,
    save_outcome,
)
from umbrella.tuning.trial_table import ranking_table

METRIC = "eval/balanced_accuracy"
Evaluation = tuple[int, float, float, bool]
"""(step of 30, metric, validation loss, whether the checkpoint is complete)."""


def write_trial(
    sweep: Path, number: int, evaluations: list[Evaluation], end: str = "", reason: str = "", **more: Any
) -> Path:
    """Write the folder of a trial as a training does. ``more``: further values of the evaluations."""
    folder = sweep / "trials" / str(number)
    folder.mkdir(parents=True)
    (folder / POINT).write_text(json.dumps({"optim.lr": 10.0**-number}), encoding="utf-8")
    lines = []
    for i, (step, metric, loss, complete) in enumerate(evaluations):
        checkpoint = folder / f"step_{step:07d}"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / METRICS).write_text(json.dumps({METRIC: metric, "eval/loss": loss}), encoding="utf-8")
        if complete:
            mark_complete(checkpoint)
        row = {"step": step, "steps": 30, METRIC: metric, "eval/loss": loss, "begun": 0.0, "time": 10.0 * (i + 1)}
        lines.append(json.dumps(row | {name: values[i] for name, values in more.items()}) + "\n")
    (folder / HISTORY).write_text("".join(lines), encoding="utf-8")
    if end:
        save_outcome(folder, end, reason)
    return folder


def read(sweep: Path, metric: str = METRIC, mode: Any = "max") -> list[Trial]:
    return read_trials(sweep, TuneSettings(metric=metric, mode=mode))


def test_trials_rank_by_the_metric_then_the_loss_of_their_best_checkpoint_and_failed_ones_last(tmp_path: Path) -> None:
    nan = float("nan")
    write_trial(tmp_path, 0, [], FAILED)
    write_trial(tmp_path, 1, [(10, 0.8, 1.0, True), (20, 0.6, 0.5, True)], STOPPED)
    write_trial(tmp_path, 2, [(10, 0.9, 0.3, False), (20, 0.7, 0.4, True), (30, 0.7, 0.2, True)], FINISHED)
    write_trial(tmp_path, 3, [(10, 0.8, 0.9, True), (30, 0.5, 0.1, True)], FINISHED)
    write_trial(tmp_path, 4, [(10, 0.99, 0.1, True)], FAILED)
    write_trial(tmp_path, 5, [(10, nan, nan, True), (30, 0.6, nan, True)], FINISHED)
    write_trial(tmp_path, 6, [(10, 0.9, 0.1, False)], STOPPED)
    trials = ranked_trials(rank_configurations(read(tmp_path), "max"))
    assert [(t.trial_id[-1], t.state, t.step, t.metric, t.loss) for t in trials] == [
        ("3", FINISHED, 10, 0.8, 0.9),
        ("1", STOPPED, 10, 0.8, 1.0),
        ("2", FINISHED, 30, 0.7, 0.2),  # the checkpoint with 0.9 is incomplete
        ("5", FINISHED, 30, 0.6, None),
        ("6", STOPPED, None, None, None),
        ("4", FAILED, 10, 0.99, 0.1),
        ("0", FAILED, None, None, None),
    ]
    assert trials[0].checkpoint == str(tmp_path / "trials" / "3" / "step_0000010")
    assert trials[0].name == "lr=0.001"
    by_loss = ranked_trials(rank_configurations(read(tmp_path, "eval/loss", "min"), "min"))
    assert [(t.trial_id[-1], t.metric) for t in by_loss[:3]] == [("3", 0.1), ("2", 0.2), ("1", 0.5)]


@pytest.mark.parametrize(
    ("best", "chance", "subjects", "warns"),
    [
        (0.75, 0.5, 12, True),
        (0.8, 0.5, 12, False),
        (0.75, 0.5, 100, False),
        (1.0, 0.5, 2, False),
        (0.5, None, 12, False),
        (None, 0.5, 12, False),
    ],
)
def test_a_sweep_without_a_trial_above_chance_gives_a_warning(
    best: float | None, chance: float | None, subjects: int, warns: bool
) -> None:
    trials = [Trial("a", {}, FINISHED, 0.3), Trial("b", {}, FINISHED, best)] if best else [Trial("c", {}, FAILED)]
    expected = f"No trial learnt the task: the best eval/balanced_accuracy, {best}, is not" if warns else ""
    assert chance_warning(trials, TuneSettings(), chance, subjects).startswith(expected)
    assert bool(chance_warning(trials, TuneSettings(), chance, subjects)) == warns


def test_the_first_outcome_of_a_trial_counts_and_only_a_failure_may_be_retried(tmp_path: Path) -> None:
    patience = "train.patience is over, step 10 of 30"
    early = write_trial(tmp_path, 1, [(10, 0.8, 1.0, True)], STOPPED_EARLY, patience)
    save_outcome(early, STOPPED, "a later outcome")
    write_trial(tmp_path, 2, [(10, 0.7, 1.0, True)])
    failed = write_trial(tmp_path, 3, [], FAILED, "no memory")
    expected = [(STOPPED_EARLY, patience), (UNFINISHED, ""), (FAILED, "no memory")]
    assert [(t.state, t.reason) for t in read(tmp_path)] == expected
    for folder in (early, failed):
        allow_retry(folder)
    assert [t.state for t in read(tmp_path)] == [STOPPED_EARLY, UNFINISHED, UNFINISHED]


def test_the_curve_and_times_of_a_resumed_trial_count_each_step_once(tmp_path: Path) -> None:
    rows = [(10, 0.5, 0.9, False), (20, 0.6, 0.8, False), (20, 0.7, 0.7, False), (30, 0.8, float("inf"), True)]
    more = {"begun": [960.0, 960.0, 1070.0, 1070.0], "time": [1000.0, 1010.0, 1100.0, 1115.0]}
    folder = write_trial(tmp_path, 1, rows, FINISHED, **more)
    with (folder / HISTORY).open("a") as file:
        file.write('{"step": 40, "ste')  # the process was killed while it wrote
    [trial] = read(tmp_path)
    assert [(row["step"], row[METRIC]) for row in trial.curve] == [(10, 0.5), (20, 0.7), (30, 0.8)]
    assert (trial.step, trial.metric, trial.loss) == (30, 0.8, None)
    # Of the first attempt, the time to its last evaluation that was not repeated.
    assert (trial.started, trial.first_evaluation, trial.seconds) == (960.0, 40.0, 40.0 + 45.0)


def test_the_folder_of_a_trial_is_named_by_its_point(tmp_path: Path) -> None:
    first = make_trial_folder(tmp_path, {"optim.lr": 0.1, "seed": 1})
    assert make_trial_folder(tmp_path, {"seed": 1, "optim.lr": 0.1}) == first
    assert make_trial_folder(tmp_path, {"optim.lr": 0.1, "seed": 2}) != first
    assert json.loads((first / POINT).read_text()) == {"optim.lr": 0.1, "seed": 1}


def seeds(lr: float, *metrics: float | None, state: str = FINISHED) -> list[Trial]:
    """One trial per seed; one without a metric failed."""
    return [
        Trial(f"{lr}/{seed}", {"optim.lr": lr, "seed": seed}, FAILED if m is None else state, m, 0.5, 30, "/c")
        for seed, m in enumerate(metrics)
    ]


def test_configurations_rank_by_their_mean_over_seeds_which_has_a_t_interval() -> None:
    lucky, steady = seeds(0.1, 0.5, 1.0, 0.6), seeds(0.2, 0.79, 0.8, 0.81)
    configurations = rank_configurations([t for pair in zip(lucky, steady, strict=True) for t in pair], "max")
    assert [c.name for c in configurations] == ["lr=0.2", "lr=0.1"]
    assert [c.mean for c in configurations] == pytest.approx([0.8, 0.7])
    # Student's t of 0.975 with 2 degrees of freedom is 4.3027; the standard error is 0.01 / sqrt(3).
    assert configurations[0].ci95 == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert format_interval(configurations[0]) == "0.8 ± 0.025 (n = 3)"
    assert ranked_trials(configurations)[0].metric == 0.81  # the best seed of the best, not the best trial
    assert [c.name for c in rank_configurations([*lucky, *steady], "min")] == ["lr=0.1", "lr=0.2"]


def test_failed_seeds_are_not_averaged_and_a_mostly_failed_configuration_is_last() -> None:
    frail, sound = seeds(0.1, 0.99, None, None), seeds(0.2, 0.7, None, 0.8, 0.6)
    failed = Trial("t", {"optim.lr": 0.2, "seed": 9}, FAILED, 0.1, 9.0, 10, "/c")  # after an evaluation
    configurations = rank_configurations([*frail, *sound, failed, *seeds(0.3, 0.65, state=STOPPED)], "max")
    assert [(c.name, c.state_counts, len(c.metrics)) for c in configurations] == [
        ("lr=0.2", "3 finished, 2 failed", 3),
        ("lr=0.3", f"1 {STOPPED}", 1),
        ("lr=0.1", "2 failed, 1 finished", 1),
    ]
    assert (configurations[0].mean, configurations[0].loss) == (pytest.approx(0.7), 0.5)
    assert (configurations[1].ci95, format_interval(configurations[1])) == (None, "0.65 (n = 1)")
    assert len(ranked_trials(configurations)) == 9


def test_the_ranking_has_a_row_per_trial_and_empty_cells_for_inactive_settings(tmp_path: Path) -> None:
    lora = {"model.train": "lora", "model.lora_rank": 8}
    curve = [{"step": 30, "begun": 0.0, "time": 60.0}]
    trials = [
        Trial("t1", lora, FINISHED, 0.9, 0.1, 30, "/c/1", curve=curve),
        Trial("t2", {"model.train": "all"}, FINISHED, 0.8, 0.2, 30, "/c/2"),
        Trial("t3", {"optim.lr": 0.1, "model.train": "all"}, FAILED, reason="it broke"),
    ]
    write_ranking(rank_configurations(trials, "max"), METRIC, tmp_path / "ranking.csv")
    with (tmp_path / "ranking.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["trial"], row["model.lora_rank"], row["optim.lr"]) for row in rows] == [
        ("t1", "8", ""), ("t2", "", ""), ("t3", "", "0.1")
    ]  # fmt: skip
    assert list(rows[0].items()) == [
        ("rank", "1"), ("trial", "t1"), ("model.train", "lora"), ("model.lora_rank", "8"), ("optim.lr", ""),
        ("state", "finished"), ("reason", ""), ("step", "30"), ("evaluations", "1"), ("eval/loss", "0.1"),
        (METRIC, "0.9"), ("mean", "0.9"), ("ci95", ""), ("seeds", "1"), ("seconds", "60.0"), ("checkpoint", "/c/1"),
    ]  # fmt: skip
    assert (rows[2]["reason"], rows[2][METRIC], rows[2]["seeds"]) == ("it broke", "", "0")


@pytest.mark.parametrize("several", [False, True])
def test_the_table_shows_configurations_if_there_are_seeds_else_trials(tmp_path: Path, several: bool) -> None:
    trials = [*seeds(0.1, 0.8), *seeds(0.2, 0.7)] if not several else [*seeds(0.1, 0.8, 0.9), *seeds(0.2, 0.7, None)]
    console = Console(width=150, record=True, file=(tmp_path / "log").open("w", encoding="utf-8"))
    console.print(ranking_table(rank_configurations(trials, "max"), METRIC, 150))
    lines = [re.split("  +", line.strip()) for line in console.export_text().splitlines() if line.startswith("0.")]
    assert lines == (
        [
            ["0.1", "2 finished", "0.5", "0.85 ± 0.64 (n = 2)"],
            ["0.2", "1 finished, 1 failed", "0.5", "0.7 (n = 1)"],
        ]
        if several
        else [["0.1", "finished", "30", "0.5", "0.8"], ["0.2", "finished", "30", "0.5", "0.7"]]
    )


def planted(n: int, effect: str) -> list[Trial]:
    """Random points of which one setting determines the metric; the rank is active with LoRA only."""
    draws = np.random.default_rng(0)
    trials = []
    for i in range(n):
        point = {
            "optim.lr": float(10 ** draws.uniform(-5, -1)),
            "optim.weight_decay": float(draws.uniform(0, 0.3)),
            "model.train": str(draws.choice(["all", "lora"])),
            "seed": i,
        }
        if point["model.train"] == "lora":
            point["model.lora_rank"] = int(draws.integers(1, 64))
        metric = 0.7 + draws.normal(0, 0.02)
        metric += {
            "optim.lr": -0.1 * (np.log10(point["optim.lr"]) + 3) ** 2,
            "model.train": 0.2 * (point["model.train"] == "lora"),
            "model.lora_rank": 0.01 * (point.get("model.lora_rank", 32) - 32),
            "": 0.0,
        }[effect]
        trials.append(Trial(f"t{i}", point, FINISHED, float(metric), 0.5, 30, "/c"))
    return trials


@pytest.mark.parametrize("name", ["optim.lr", "model.train"])  # numbers, and words
def test_the_setting_with_an_effect_has_the_importance(name: str) -> None:
    found = compute_importance(planted(24, name))
    assert found.significant[0] == name
    assert found.shares[name] > 0.9
    assert "optim.weight_decay" in found.shares
    assert "optim.weight_decay" not in found.significant
    assert "seed" not in found.shares
    assert found.r2 > 0.3


def test_the_importance_is_unavailable_without_effects_or_with_too_few_trials() -> None:
    few = planted(MIN_TRIALS - 1, "optim.lr")
    failed = [Trial(f"f{i}", t.point, FAILED, t.metric) for i, t in enumerate(few)]
    flat = [Trial(f"e{i}", t.point, FINISHED, 0.5) for i, t in enumerate(planted(MIN_TRIALS, "optim.lr"))]
    only_seeds = [Trial(f"s{i}", {"seed": i}, FINISHED, 0.5 + i) for i in range(MIN_TRIALS)]
    cases = [
        (few + failed, "At least 8"),
        (flat, "same metric"),
        (only_seeds, "No setting"),
        (planted(24, ""), "R² = "),
    ]
    for trials, why in cases:
        found = compute_importance(trials)
        assert (found.shares, found.significant) == ({}, [])
        assert why in found.unavailable


def test_the_name_of_a_training_or_sweep_is_its_best_checkpoint(tmp_path: Path) -> None:
    settings = load_settings(overrides={"resources.storage": str(tmp_path)})
    evaluations = [(step, metric, 1.0, True) for step, metric in ((10, 0.6), (20, 0.9), (30, 0.7))]
    best = write_trial(tmp_path / "sweeps/second", 1, evaluations, "finished")
    training = tmp_path / "trainings/first"
    shutil.copytree(best, training)
    for folder in (tmp_path / "sweeps/second", training, *best.glob("step_*"), *training.glob("step_*")):
        (folder / SETTINGS).write_text(settings.to_yaml(), encoding="utf-8")

    def named(name: str) -> Path:
        return named_checkpoint(settings.with_values({"checkpoint": name}))

    assert named("second") == best / "step_0000020"
    step = training / "step_0000020"
    assert named("first") == named(str(training)) == named(str(step)) == step
    with pytest.raises(UserError, match=r"^checkpoint=third: there is no such .*, as in checkpoint=\w+, the newest"):
        named("third")
    (tmp_path / "sweeps/first").mkdir()
    with pytest.raises(UserError, match=r"^checkpoint=first: is \S+trainings/first and \S+sweeps/first; write"):
        named("first")
