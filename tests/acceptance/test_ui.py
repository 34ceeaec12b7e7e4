"""``umbrella ui``: the address that it prints last opens the runs of the newest sweep in a browser, best first."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.conftest import EXPERIMENTS, log_sweep
from umbrella.tracking.store import open_experiment

pytestmark = pytest.mark.acceptance


@contextmanager
def umbrella_ui(storage: Path, port: int, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command, and send SIGTERM at the end."""
    command = [sys.executable, str(EXPERIMENTS / "ui.py"), f"resources.storage={storage}", "--port", str(port)]
    pipe, variables = subprocess.PIPE, {**os.environ, **variables}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=variables) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_the_last_line_opens_the_newest_sweep_best_first(
    mlflow_store: Callable[[Path], str], tmp_path: Path, port: int
) -> None:
    uri = mlflow_store(tmp_path)
    experiment = open_experiment(uri, "umbrella", tmp_path)
    log_sweep(uri, experiment, tmp_path / "old", "eval/balanced_accuracy", "max", [0.9])
    log_sweep(uri, experiment, tmp_path / "new", "eval/balanced_accuracy", "max", [0.5, 1.0, 0.75])
    with umbrella_ui(tmp_path, port) as process, sync_playwright() as playwright:
        assert process.stdout
        assert process.stdout.readline() == f"log of MLflow's server: {tmp_path / 'mlflow_server.log'}\n"
        address = process.stdout.readline().strip()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 800})
        page.goto(address)
        expect(page.get_by_text("4 matching runs")).to_be_visible(timeout=60_000)
        rows = page.locator(".ag-pinned-left-cols-container .ag-row")
        expect(rows).to_have_count(4)
        ordered = sorted(rows.all(), key=lambda row: int(row.get_attribute("row-index") or 0))
        assert [row.locator("a").first.inner_text() for row in ordered] == ["lr=1.0", "lr=0.75", "lr=0.5", "new"]
        sources = page.locator("[role=gridcell][col-id*='Source']").all_inner_texts()
        assert [source.strip() for source in sources] == ["new"] * 4
        browser.close()
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "", "the log of the server is in its file"
    assert process.returncode == 128 + signal.SIGTERM


def test_a_port_in_use_is_an_error(tmp_path: Path, port: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with umbrella_ui(tmp_path, port) as process:
            output, errors = process.communicate()
    assert errors == f"error: port {port} is in use, maybe by another MLflow; choose another one: --port {port + 1}\n"
    assert (output, process.returncode) == ("", 2)


def test_the_last_words_of_a_server_that_does_not_start_are_printed(
    mlflow_store: Callable[[Path], str], tmp_path: Path, port: int
) -> None:
    mlflow_store(tmp_path)
    (tmp_path / "uvicorn.py").write_text("raise SystemExit('no web server today')", encoding="utf-8")
    with umbrella_ui(tmp_path, port, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}") as process:
        _, errors = process.communicate()
    assert errors.startswith(f"error: MLflow's server does not start; {tmp_path / 'mlflow_server.log'} ends with: ")
    assert "no web server today" in errors
    assert (errors.count("\n"), process.returncode) == (1, 2)
