"""The folder of a sweep: its specification and data fingerprint, and what may change when it is resumed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.paths import SWEEPS, TRAININGS
from umbrella.training.checkpoint_sync import find_run
from umbrella.tuning.sweep import run_sweep
from umbrella.tuning.sweep_files import SweepSpec, check_fingerprint, load_spec, save_spec

SPACE = {"optim.lr": {"grid": [1e-3, 1e-4]}}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The folder of a sweep that has just started."""
    folder = tmp_path / "sweeps" / "first"
    folder.mkdir(parents=True)
    settings = load_settings(overrides={"tune.space": SPACE, "resources.storage": str(tmp_path)})
    save_spec(folder, SweepSpec(settings, frozenset({"optim.warmup"})), "a" * 64)
    return folder


def test_the_specification_of_a_sweep_is_read_from_its_present_place(sweep: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    sweep.parent.rename(moved / "sweeps")
    settings, fixed = load_spec(moved / "sweeps/first")
    assert (settings.tune.space, fixed, settings.resources.storage) == (SPACE, {"optim.warmup"}, str(moved))
    assert find_run(settings.resources, SWEEPS, "last", list) == moved / "sweeps/first"


def test_a_moved_sweep_is_uploaded_from_its_present_place(sweep: Path, tmp_path: Path) -> None:
    values = {"tune.space": {"optim.lr": {"no such": 1}}, "resources.storage": str(tmp_path / "before")}
    settings = load_settings(overrides={**values, "resources.upload": f"file://{tmp_path}/store"})
    with pytest.raises(UserError, match=r"tune\.space.*no such"):
        run_sweep(settings, frozenset(), lambda things, what: things, sweep)
    assert (tmp_path / "store/sweeps/first/settings.yaml").exists()
    assert not (tmp_path / "before").exists()


def test_a_run_that_does_not_exist_is_named_with_the_existing_ones(sweep: Path, tmp_path: Path) -> None:
    resources = load_settings(overrides={"resources.storage": str(tmp_path)}).resources
    with pytest.raises(UserError, match=r"^--resume second: .*sweeps has no such run; existing: first$"):
        find_run(resources, SWEEPS, "second", list)
    with pytest.raises(UserError, match=r"^--resume last: .*trainings has no such run; existing: none$"):
        find_run(resources, TRAININGS, "last", list)


def test_a_sweep_is_not_resumed_with_other_data(sweep: Path) -> None:
    check_fingerprint(sweep, "a" * 64)
    with pytest.raises(UserError, match="first was started with other data"):
        check_fingerprint(sweep, "b" * 64)


SAME = "tune: {space: {optim.lr: {grid: [1.0e-3, 1.0e-4]}}}\n"
LEAVE_OUT = "--resume uses the settings of the sweep; leave out "


@pytest.mark.parametrize(
    ("file", "words", "message"),
    [
        (
            "tune: {space: {optim.lr: {grid: [1.0, 2.0]}}}",
            [],
            f"{LEAVE_OUT}tune.space.optim.lr.grid (was [0.001, 1e-4], is [1, 2])",
        ),
        ("tune: {space: {optim.lr: null}}", [], f"{LEAVE_OUT}tune.space.optim.lr.grid (was [0.001, 1e-4], is unset)"),
        (f"{SAME}name: other", ["--config", "{}"], f'{LEAVE_OUT}name (was "", is other)'),
        (SAME, ["optim.lr=7e-4"], f"{LEAVE_OUT}optim.lr (is swept)"),
        ("optim: {clip: 2.0}\nseed: 1", [], f"{LEAVE_OUT}optim.clip (was 1, is 2), seed (was 0, is 1)"),
        (SAME, ["--resume", "another"], "sweeps has no such run; existing: first"),
    ],
)
def test_other_settings_beside_resume_are_refused_by_name(
    sweep: Path, tmp_path: Path, run: Callable[..., Any], file: str, words: list[str], message: str
) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(file, encoding="utf-8")
    words = [str(path), "--resume", "first", *(word.format(path) for word in words)]
    done = run("tune.py", *words, f"resources.storage={sweep.parents[1]}", "--dry-run")
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_the_original_settings_and_other_resources_are_accepted_beside_resume(
    sweep: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    began, here = tmp_path / "began.yaml", tmp_path / "here.yaml"
    began.write_text(f"{SAME}optim: {{warmup: 5}}\n", encoding="utf-8")
    here.write_text("resources: {max_failures: 7, keep_checkpoints: 5}\n", encoding="utf-8")
    words = [str(began), "optim.warmup=20", str(here), "resources.keep_checkpoints=6"]
    done = run("tune.py", *words, f"resources.storage={sweep.parents[1]}", "--resume", "last", "--dry-run")
    assert (done.status, done.stderr) == (0, "")
    assert "trials: 2\n  lr=0.001\n  lr=1e-4\n" in done.stdout
    assert re.search(r"max_failures: 7, keep_checkpoints: 6\b", " ".join(done.stdout.split()))
