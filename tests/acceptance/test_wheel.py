"""The wheel: the command, the settings files and the pages work from any folder, without the checkout."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.acceptance
ROOT = Path(__file__).resolve().parents[2]
SMALL = ["cohort.subjects=24", "train.epochs=1", "evaluate.bootstrap=100", "evaluate.pictures=1", "tune.scheduler=none"]


@pytest.fixture(scope="module")
def umbrella(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess]:
    """Runs ``umbrella`` of the wheel, with the other packages of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    site, pip = folder / "site", [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([*pip, str(site), *map(str, folder.glob("*.whl"))], check=True)
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(site / "bin/umbrella"), *words]
        return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)

    return run


def test_a_sweep_with_a_ready_settings_file_runs_from_the_wheel(umbrella: Callable, tmp_path: Path) -> None:
    done = umbrella("tune", "tune.yaml", *SMALL, f"resources.storage={tmp_path}/runs")
    assert done.returncode == 0, done.stderr
    assert "best trial:" in done.stdout
    (page,) = tmp_path.glob("runs/evaluations/*/report.html")
    assert "<html" in page.read_text(encoding="utf-8")


def test_the_commands_of_the_wheel_are_those_of_the_package(umbrella: Callable) -> None:
    from umbrella.commands import COMMANDS
    from umbrella.version import __version__

    assert umbrella("--version").stdout == f"umbrella {__version__}\n"
    for name in COMMANDS:
        done = umbrella(name, "--help")
        assert (done.returncode, done.stdout.startswith(f"usage: umbrella {name} ")) == (0, True), done.stderr
