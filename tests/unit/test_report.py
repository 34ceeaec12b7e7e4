"""The report of a sweep: a self-contained page with escaped texts, and what the terminal prints."""

import re
from html import unescape
from pathlib import Path

import pytest
from rich.console import Console

from umbrella.config import Settings, load_settings
from umbrella.training.progress_log import FINISHED
from umbrella.tuning.report import SweepResult, print_result, write_report
from umbrella.tuning.results import Trial, best_trial, rank_configurations, ranked_trials
from umbrella.tuning.sweep_files import FAILED, STOPPED

METRIC = "eval/balanced_accuracy"
BAD = "it broke on <script>alert(1)</script> & went"


def trial(lr: float, seed: int, metric: float | None, state: str = FINISHED, reason: str = "") -> Trial:
    row = {"step": 10, METRIC: metric, "eval/loss": 0.5, "begun": 1000.0, "time": 4600.0}
    point = {"optim.lr": lr, "seed": seed}
    return Trial(f"t{lr}-{seed}", point, state, metric, 0.5, 10, f"/c/{seed}", reason, [row] if metric else [])


TRIALS = [
    *(trial(0.001, seed, metric) for seed, metric in enumerate((0.75, 0.875, 0.8125))),
    trial(0.01, 0, 0.5),
    trial(0.01, 1, 0.5, STOPPED, "at evaluation 1, step 10 of 30"),
    trial(0.01, 2, None, FAILED, BAD),
]


def report(folder: Path, trials: list[Trial], settings: Settings | None = None, subjects: int = 0) -> str:
    """Write the report of a sweep; return the text of its page without tags."""
    folder.mkdir(exist_ok=True)
    write_report(rank_configurations(trials, "max"), settings or Settings(), folder, subjects, "No trial learnt.")
    page = (folder / "report.html").read_text(encoding="utf-8")
    return " ".join(unescape(re.sub("<[^>]+>", " ", page)).split())


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    files = write_report(rank_configurations(TRIALS, "max"), Settings(), tmp_path)
    assert set(files) == set(tmp_path.iterdir())
    figures = [f"{name}.png" for name in ("metric", "ranking", "curves", "times")]
    assert {file.name for file in files} == {"report.html", "ranking.csv", "best.yaml", *figures}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"(?:src|srcset|data|action)=.(.{5})", page) == ["data:"] * 4
    assert not re.search(r"href=.(\w+:|/)", page), "relative links only"
    assert not re.search(r"url\(|<(script|link|iframe|object)", page)


def test_the_page_has_every_configuration_and_trial_with_its_cost(tmp_path: Path) -> None:
    resources = {"resources.workers": 4, "resources.cpus_per_worker": 3, "resources.gpus_per_worker": 0.5}
    page = report(tmp_path, TRIALS, load_settings(overrides=resources))
    assert f"lr=0.001: {METRIC} 0.8125 ± 0.16 (n = 3) over seeds" in page.replace(" :", ":")
    assert "1 finished, 1 stopped by the scheduler, 1 failed" in page
    assert BAD in page, "as words, not as a script"
    assert "at evaluation 1, step 10 of 30" in page
    assert not re.search(r"t0\.01-\d", page), "labels, not the ids of trials"
    assert "At least 8 trials with a metric are needed; there are 5." in page
    assert "No trial learnt." in page
    assert "All trials: 5:00:00 (h:mm:ss) with 5 evaluations, 60 CPU-hours and 10 GPU-hours." in page


def test_the_page_of_one_seed_has_no_interval_but_the_resolution_of_the_metric(tmp_path: Path) -> None:
    page = report(tmp_path, [trial(0.1, 0, 0.75)], subjects=48)
    assert "so there is no interval" in page
    # One of 48 is 0.021; 1.96 * sqrt(0.75 * 0.25 / 48) is 0.1225.
    assert "measured on 48 subjects: one correct answer more or less changes it by about 0.021" in page
    assert "± 0.12 (95%, binomial)" in page
    assert page.count("±") == 1


def test_the_page_of_a_sweep_without_results_has_the_reasons(tmp_path: Path) -> None:
    page = report(tmp_path, [trial(lr, 0, None, FAILED, f"no memory at {lr}") for lr in (0.1, 0.2)])
    assert "no memory at 0.1" in page
    assert "No trial has finished an evaluation" in page
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "ranking.csv"}
    assert best_trial(rank_configurations([trial(0.1, 0, 0.9, FAILED)], "max")) is None


def test_the_best_settings_are_written_and_printed_with_the_command_that_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my sweep"
    page = report(folder, TRIALS)
    best = load_settings([folder / "best.yaml"])
    assert (best.optim.lr, best.seed, best.tune.space) == (0.001, 1, {})
    assert f"umbrella train '{folder}/best.yaml'" in page
    configurations = rank_configurations(TRIALS, "max")
    trials = ranked_trials(configurations)
    result = SweepResult(configurations, trials, best, folder, "sqlite:///runs/mlflow.db", "No trial learnt.")
    console = Console(width=120, record=True, file=(tmp_path / "log").open("w", encoding="utf-8"))
    print_result(result, console)
    printed = console.export_text()
    assert f"lr=0.001 seed=1: {METRIC} 0.875 at step 10, over seeds 0.8125 ± 0.16 (n = 3)" in printed
    assert "umbrella train 'my sweep/best.yaml'" in printed
    assert f"file://{tmp_path}/my%20sweep/report.html" in printed
    assert "1 finished, 1 stopped by the scheduler, 1 failed" in printed
    assert printed.endswith("\nNo trial learnt.\n")
