"""The pages of a sweep, an evaluation and a cohort, and Ray's dashboard, in Chromium."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.conftest import EXPERIMENTS

pytestmark = pytest.mark.acceptance

SMALL = ("cohort.subjects=24", "train.epochs=2", "evaluate.bootstrap=100")
PAGES = ("sweep", "evaluation", "cohort", "audit")
TRIAL = re.compile(r"lr=\S+ supervise=\w+")
HASH = re.compile(r"\b[0-9a-f]{10}\b")


def command(script: str, storage: Path, *words: str) -> list[str]:
    return [sys.executable, str(EXPERIMENTS / script), f"resources.storage={storage}", *SMALL, *words]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a small sweep and of the report of its cohort."""
    folder = tmp_path_factory.mktemp("runs")
    for words in (command("tune.py", folder, "name=night"), command("prepare.py", folder)):
        subprocess.run(words, check=True, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def pages(storage: Path) -> dict[str, Path]:
    files = ("sweeps/night/report.html", "evaluations/night/report.html", "report/index.html")
    audit = next(storage.glob("sweeps/*/trials/*/mlflow/files/mask_audit.html"))
    return dict(zip(PAGES, [*(storage / file for file in files), audit], strict=True))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])


@pytest.mark.parametrize("width", [1600, 390])
@pytest.mark.parametrize("name", PAGES)
def test_no_page_scrolls_sideways_and_all_its_links_resolve(
    pages: dict[str, Path], browser: Browser, name: str, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(pages[name].as_uri())
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    addresses = page.evaluate("[...document.querySelectorAll('[href], [src]')].map(e => e.href || e.src)")
    files = [Path(unquote(urlsplit(address).path)) for address in addresses if not address.startswith("data:")]
    assert [file for file in files if not file.exists()] == []
    assert {urlsplit(address).scheme for address in addresses} <= {"file", "data"}
    page.close()


def test_the_reports_of_a_sweep_and_its_evaluation_name_trials_by_their_settings_and_lead_to_each_other(
    pages: dict[str, Path], browser: Browser
) -> None:
    page = browser.new_page()
    page.goto(pages["sweep"].as_uri())
    assert TRIAL.search(page.inner_text("main"))
    page.get_by_role("link", name="evaluation").click()
    expect(page).to_have_url(pages["evaluation"].as_uri())
    text = page.inner_text("main")
    assert TRIAL.search(text)
    assert not HASH.search(text)
    page.get_by_role("link", name="report of the sweep").click()
    expect(page).to_have_url(pages["sweep"].as_uri())
    page.close()


def test_no_volume_of_the_synthetic_cohort_is_unlike_the_others(storage: Path) -> None:
    with (storage / "report" / "volumes.csv").open(newline="") as file:
        assert {row["flags"] for row in csv.DictReader(file)} == {""}


def test_the_printed_command_gives_the_token_of_the_printed_dashboard(
    storage: Path, browser: Browser, tmp_path: Path
) -> None:
    words = command("train.py", storage, "train.epochs=1000")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout
        try:
            line = next(line for line in script.stdout if line.startswith("Ray dashboard"))
            [(address, printed)] = re.findall(r"(http://\S+) \(token: (.*)\)", line)
            token = subprocess.run(printed.split(), check=True, capture_output=True, text=True, env=environment).stdout
            page = browser.new_page()
            page.goto(address)
            page.get_by_role("textbox", name="Authentication Token").fill(token.strip())
            page.get_by_role("button", name="Submit").click()
            page.goto(f"{address}/#/jobs")
            expect(page.get_by_text("experiments/train.py").first).to_be_visible()
        finally:
            script.send_signal(signal.SIGINT)
            script.stdout.read()
