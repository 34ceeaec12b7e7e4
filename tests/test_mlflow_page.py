"""MLflow's own pages, in a browser: a sweep's winner can be seen without preparation."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from umbrella.tracking.runs import Tracker
from umbrella.tracking.store import open_experiment

UI = Path(__file__).resolve().parent.parent / "experiments" / "ui.py"
ENDS = {(1e-4, "all"): ("KILLED", "stopped by the scheduler"), (3e-3, "all"): ("FAILED", "failed")}
POINTS = [(rate, mask) for rate in (1e-4, 1e-3, 3e-3) for mask in ("all", "last_assistant")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, Debian's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[dev]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium to look at MLflow's page: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def links(mlflow_store: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What ``make ui`` prints over a sweep of six trials, while it serves."""
    storage = tmp_path_factory.mktemp("sweep")
    uri = mlflow_store(storage)
    experiment = open_experiment(uri, "umbrella", storage)
    parent = Tracker.start(uri, experiment, "sweep")
    for rate, mask in POINTS:
        trial = Tracker.start(uri, experiment, f"lr={rate:g} supervise={mask}", parent=parent.run_id)
        trial.params({"a.constant": 1, "mask.supervise": mask, "optim.lr": rate, "train.epochs": 8})
        best = 0.9375 if (rate, mask) == (1e-3, "last_assistant") else 0.5
        for step in range(1, 31):
            trial.metrics({"train/loss": 3 / step, "train/lr": rate}, step)
            if step % 10 == 0:
                last = {"eval/balanced_accuracy": 0.25, "eval/loss": 4 / step} if step == 30 else {}
                now = {"eval/balanced_accuracy": best * step / 20, "eval/loss": 4 / step}
                trial.metrics(last or now | {f"best/{name}": value for name, value in now.items()}, step)
                trial.flush()
        trial.end(*ENDS.get((rate, mask), ()))
    parent.metrics({"best/eval/balanced_accuracy": 0.9375}, 0)
    parent.end()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, str(UI), "--port", str(port), f"resources.storage={storage}"]
    env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    with (storage / "log").open("w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
            time.sleep(0.1)
        printed = (storage / "log").read_text(encoding="utf-8")
        yield dict(line.split(": ", 1) for line in printed.splitlines() if ": " in line)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def seen(browser: Any, address: str, *words: str, finished: int = 0) -> str:
    """The text of a page once it shows all these words, and so many runs as finished."""
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    page.goto(address)
    for some in words:
        page.get_by_text(some).first.wait_for(timeout=60_000)
    if finished:
        page.get_by_text("finished", exact=True).nth(finished - 1).wait_for(timeout=60_000)
    return page.inner_text("body")


def test_it_is_said_where_both_pages_are(links: dict[str, str]) -> None:
    assert links["MLflow"].startswith("http://127.0.0.1:")
    assert "http://127.0.0.1:8265" in links["Ray dashboard"], "or where it will be"


def test_the_compare_page_opens_with_the_metric_the_swept_settings_and_the_winner(
    browser: Any, links: dict[str, str]
) -> None:
    shown = ("Parallel Coordinates Plot", "0.93750", "lr=0.001 supervise=last_assistant")
    text = seen(browser, links["trials of the newest sweep, side by side"], *shown)
    assert "Comparing 6 Runs" in text
    chosen, drawn = text.split("Parameters:")[1].split("Run details")[0].split("Clear All")
    assert chosen.split("Metrics:")[0].split() == ["mask.supervise", "optim.lr"]
    assert chosen.split("Metrics:")[1].split() == ["best/eval/balanced_accuracy"]
    assert "0.93750" in drawn, "the winner's value, at the end of the axis"
    assert "lr=0.001 supervise=last_assistant" in text


def test_the_table_of_runs_opens_with_the_winner_first_what_was_swept_and_how_each_ended(
    browser: Any, links: dict[str, str]
) -> None:
    names = [f"lr={rate:g} supervise={mask}" for rate, mask in POINTS]
    text = seen(browser, links["runs, best first"], *names, "stopped by the scheduler", finished=5)
    for column in ("best/eval/balanced_accuracy", "mask.supervise", "optim.lr", "umbrella.outcome"):
        assert column[:12] in text
    cells = [line.strip() for line in text.splitlines()]
    counts = {outcome: cells.count(outcome) for outcome in ("finished", "stopped by the scheduler", "failed")}
    assert counts == {"finished": 5, "stopped by the scheduler": 1, "failed": 1}, "the sweep's own run, too"
    names = [line for line in text.splitlines() if line.startswith("lr=")]
    assert names[0] == "lr=0.001 supervise=last_assistant"
    assert len(names) == 6
