"""The page of a sweep: it stands for itself, hides nothing, and takes nothing as HTML; and what the terminal says."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from rich.console import Console

from umbrella.config import Settings, load_settings
from umbrella.training.progress_log import FINISHED
from umbrella.training.settings import ResourceSettings
from umbrella.tuning.report import (
    ReportFiles,
    SweepResult,
    best_trial,
    compute_cost,
    format_duration,
    print_result,
    write_report,
)
from umbrella.tuning.results import Evaluation, Trial, rank_configurations, ranked_trials
from umbrella.tuning.sweep_files import FAILED, STOPPED

METRIC = "eval/balanced_accuracy"
BAD = "it broke on <script>alert(1)</script> & went"


def trial(lr: float, seed: int, metric: float | None, state: str = FINISHED, reason: str = "") -> Trial:
    point = {"optim.lr": lr, "seed": seed}
    curve = (Evaluation(10, 1.0, metric, 0.5, 0.4, "/c"),) if metric else ()
    return Trial(f"t{lr}-{seed}", point, state, metric, 0.5, 10, f"/c/{seed}", reason, curve, 1000.0, 3600.0, 30.0)


TRIALS = [
    *(trial(0.001, seed, metric) for seed, metric in enumerate((0.75, 0.875, 0.8125))),
    trial(0.01, 0, 0.5),
    trial(0.01, 1, 0.5, STOPPED, "at evaluation 1, step 10 of 30"),
    trial(0.01, 2, None, FAILED, BAD),
]


class Page(HTMLParser):
    """The words of a page, its tags, and every address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def report(
    folder: Path, trials: list[Trial], settings: Settings | None = None, subjects: int = 0, warning: str = ""
) -> tuple[ReportFiles, Page]:
    folder.mkdir(exist_ok=True)
    files = write_report(rank_configurations(trials, "max"), Settings(), folder, subjects, warning)
    return files, Page(files.page.read_text(encoding="utf-8"))


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    files, page = report(tmp_path, TRIALS)
    assert len(page.addresses) == len(files.figure_files) == 4
    assert {urlsplit(address).scheme for address in page.addresses} == {"data"}
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in files.page.read_text(encoding="utf-8")
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in files.all}
    assert set(files.figure_files) == {"metric", "ranking", "curves", "times"}


def test_settings_are_compared_by_their_seeds_and_every_trial_is_there(tmp_path: Path) -> None:
    _, page = report(tmp_path, TRIALS)
    assert f"lr=0.001: {METRIC} 0.8125 ± 0.16 (n = 3) over seeds" in page.text.replace(" :", ":")
    assert "1 finished, 1 stopped by the scheduler, 1 failed" in page.text
    assert BAD in page.text  # as words, not as a script
    assert "at evaluation 1, step 10 of 30" in page.text
    assert {t.trial_id for t in TRIALS} <= set(page.words)
    assert "At least 8 trials with a metric are needed; there are 5." in page.text


def test_one_seed_has_no_interval_and_the_page_says_so(tmp_path: Path) -> None:
    _, page = report(tmp_path, [TRIALS[0], TRIALS[3]])
    assert "so there is no interval" in page.text
    assert "±" not in page.text


def test_the_page_says_what_so_few_subjects_can_tell_apart(tmp_path: Path) -> None:
    _, page = report(tmp_path, [trial(0.1, 0, 0.75)], subjects=48)
    # One of 48 is 0.021; 1.96 * sqrt(0.75 * 0.25 / 48) is 0.1225.
    assert "measured on 48 subjects: one correct answer more or less changes it by about 0.021" in page.text
    assert "± 0.12 (95%, binomial)" in page.text


def test_where_all_failed_the_page_says_why(tmp_path: Path) -> None:
    files, page = report(tmp_path, [trial(lr, 0, None, FAILED, f"no room at {lr}") for lr in (0.1, 0.2)])
    assert files.best is None
    assert "no room at 0.1" in page.text
    assert "No trial has finished an evaluation" in page.text
    assert files.ranking.exists()
    assert best_trial(rank_configurations([trial(0.1, 0, 0.9, FAILED)], "max")) is None


def test_the_winner_is_written_as_a_training_and_its_command_is_on_the_page(tmp_path: Path) -> None:
    files, page = report(tmp_path, TRIALS)
    assert files.best
    best = load_settings([files.best])
    assert (best.optim.lr, best.seed, best.tune.space) == (0.001, 1, {})
    assert files.command in page.text
    assert files.overrides in page.text
    assert files.command.endswith(str(tmp_path / "best.yaml"))


def test_cost_is_what_was_reserved() -> None:
    resources = ResourceSettings(workers=4, cpus_per_worker=3, gpus_per_worker=0.5)
    spent = compute_cost([*TRIALS[:3], Trial("t", {}, FAILED)], resources)
    assert (spent.hours, spent.cpu_hours, spent.gpu_hours) == (3.0, 36.0, 6.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, ""),
        (0.4, "0 s"),
        (59.7, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (12_000, "3 h 20 min"),
        (7e6, "1,944 h 26 min"),
    ],
)
def test_times_are_said_as_people_do(seconds: float | None, words: str) -> None:
    assert format_duration(seconds) == words


def test_the_terminal_tells_the_winner_its_command_and_where_the_report_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files, page = report(tmp_path / "my sweep", TRIALS, warning="No trial learnt the task.")
    assert "No trial learnt the task." in page.text
    configurations = rank_configurations(TRIALS, "max")
    best = load_settings([files.best] if files.best else [])
    result = SweepResult(
        configurations,
        ranked_trials(configurations),
        best,
        tmp_path,
        files,
        "sqlite:///runs/mlflow.db",
        "No trial learnt the task.",
    )
    console = Console(width=120, record=True, file=(tmp_path / "log").open("w", encoding="utf-8"))
    print_result(result, console)
    said = console.export_text()
    assert f"lr=0.001 seed=1: {METRIC} 0.875 at step 10, over seeds 0.8125 ± 0.16 (n = 3)" in said
    assert "python experiments/train.py 'my sweep/best.yaml'" in said
    assert f"file://{tmp_path}/my%20sweep/report.html" in said
    assert "1 finished, 1 stopped by the scheduler, 1 failed" in said
    assert said.endswith("\nNo trial learnt the task.\n")
