"""The documentation as a site."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which
from threading import Thread

import pytest
from playwright.sync_api import sync_playwright

from umbrella import MODULES
from umbrella.commands import COMMANDS
from umbrella.config import Settings
from umbrella.settings_help import list_settings

pytestmark = pytest.mark.acceptance
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The address of the site on localhost."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_reference_has_each_setting_command_and_public_name(site: Path) -> None:
    settings = (site / "settings.html").read_text(encoding="utf-8")
    commands = (site / "commands.html").read_text(encoding="utf-8")
    assert [e.name for e in list_settings(Settings()) if f'id="{e.name}"' not in settings] == []
    assert [name for name in COMMANDS if f"usage: umbrella {name} " not in commands] == []
    names = (site / "api.html").read_text(encoding="utf-8")
    assert [name for name, module in MODULES.items() if f'id="umbrella.{module}.{name}"' not in names] == []


@pytest.mark.parametrize("width", [1600, 390])
def test_a_page_makes_no_request_to_another_host_and_fits_the_window(site: Path, address: str, width: int) -> None:
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 1000})
        page.on("request", lambda request: requests.append(request.url))
        wide = []
        for file in sorted(site.glob("*.html")):
            page.goto(address + file.name, wait_until="load")
            if page.evaluate("document.documentElement.scrollWidth") > width:
                wide.append(file.name)
        browser.close()
    assert len(requests) > 20
    assert [url for url in requests if not url.startswith((address, "data:"))] == []
    assert wide == []
