"""A sweep's folder: what was asked, and of which data."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.tuning.sweep import run_sweep
from umbrella.tuning.sweep_files import SweepSpec, check_fingerprint, latest_sweep, load_spec, save_spec

SPACE = {"optim.lr": {"grid": [1e-3, 1e-4]}}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The folder of a sweep, just begun."""
    folder = tmp_path / "sweeps" / "first"
    folder.mkdir(parents=True)
    settings = load_settings(overrides={"tune.space": SPACE, "resources.storage": str(tmp_path)})
    save_spec(folder, SweepSpec(settings, frozenset({"optim.warmup"})), "a" * 64)
    return folder


def test_a_question_is_read_back_as_it_was_asked(sweep: Path) -> None:
    settings, given = load_spec(sweep)
    assert settings.tune.space == SPACE
    assert given == {"optim.warmup"}
    assert latest_sweep(sweep.parent) == sweep


def test_a_sweep_that_was_moved_writes_where_it_lies_now(sweep: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    sweep.parent.rename(moved / "sweeps")
    assert load_spec(moved / "sweeps/first").settings.resources.storage == str(moved)


def test_a_sweep_that_was_moved_is_uploaded_from_its_new_place(sweep: Path, tmp_path: Path) -> None:
    words = {"tune.space": {"optim.lr": {"no such": 1}}, "resources.storage": str(tmp_path / "before")}
    settings = load_settings(overrides={**words, "resources.upload": f"file://{tmp_path}/store"})
    with pytest.raises(UserError, match=r"tune\.space.*no such"):
        run_sweep(settings, frozenset(), lambda things, what: things, sweep)
    assert (tmp_path / "store/sweeps/first/settings.yaml").exists()
    assert not (tmp_path / "before").exists()


def test_a_sweep_that_there_is_not_is_named_with_those_that_there_are(sweep: Path) -> None:
    with pytest.raises(UserError, match=r"no sweep .*second; existing sweeps: first$"):
        load_spec(sweep.parent / "second")
    with pytest.raises(UserError, match="holds no sweep"):
        latest_sweep(sweep / "trials")


def test_a_sweep_does_not_go_on_with_other_data(sweep: Path) -> None:
    check_fingerprint(sweep, "a" * 64)
    with pytest.raises(UserError, match="first was started with other data"):
        check_fingerprint(sweep, "b" * 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "last", "optim.lr=1"], "uses the settings of the sweep; leave out optim.lr"),
        (["--resume", "another"], "there is no sweep .*another; existing sweeps: first"),
    ],
)
def test_what_cannot_be_resumed_is_told_in_one_line(
    sweep: Path, run: Callable[..., Any], words: list[str], message: str
) -> None:
    done = run("tune.py", f"resources.storage={sweep.parents[1]}", *words)
    assert done.status == 2
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr)


def test_what_is_resumed_is_the_sweeps_own_question(sweep: Path, run: Callable[..., Any]) -> None:
    done = run("tune.py", f"resources.storage={sweep.parents[1]}", "--resume", "first", "--dry-run")
    assert done.status == 0
    assert "trials: 2" in done.stdout
    assert "lr=1e-4" in done.stdout


QUESTION = "tune: {space: {optim.lr: {grid: [1.0e-3, 1.0e-4]}}}\n"


@pytest.mark.parametrize(
    ("asked", "words", "differs"),
    [
        (
            "tune: {space: {optim.lr: {grid: [1.0, 2.0]}}}",
            [],
            "tune.space.optim.lr.grid (was [0.001, 1e-4], is [1, 2])",
        ),
        ("tune: {space: {optim.lr: null}}", [], "tune.space.optim.lr.grid (was [0.001, 1e-4], is unset)"),
        (f"{QUESTION}optim: {{warmup: 5}}", [], "optim.warmup (was 20, is 5)"),
        (f"{QUESTION}name: other", ["--config", "{}"], 'name (was "", is other)'),
        (QUESTION, ["optim.lr=0.001"], "optim.lr (is swept)"),
        ("optim: {clip: 2.0}\nseed: 1", [], "optim.clip (was 1, is 2), seed (was 0, is 1)"),
    ],
)
def test_what_a_file_or_a_word_beside_resume_asks_otherwise_is_refused_by_name(
    sweep: Path, tmp_path: Path, run: Callable[..., Any], asked: str, words: list[str], differs: str
) -> None:
    file = tmp_path / "other.yaml"
    file.write_text(asked, encoding="utf-8")
    words = [str(file), *(word.format(file) for word in words)]
    done = run("tune.py", *words, f"resources.storage={sweep.parents[1]}", "--resume", "first", "--dry-run")
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert f"--resume uses the settings of the sweep; leave out {differs}" in done.stderr


def test_what_began_a_sweep_may_stand_beside_resume_with_other_resources(
    sweep: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    began, here = tmp_path / "began.yaml", tmp_path / "here.yaml"
    began.write_text(f"{QUESTION}optim: {{warmup: 5}}\n", encoding="utf-8")
    here.write_text("resources: {max_failures: 7, keep_checkpoints: 5}\n", encoding="utf-8")
    words = [str(began), "optim.warmup=20", str(here), "resources.keep_checkpoints=6"]
    done = run("tune.py", *words, f"resources.storage={sweep.parents[1]}", "--resume", "first", "--dry-run")
    assert (done.status, done.stderr) == (0, "")
    assert "trials: 2" in done.stdout
    assert re.search(r"max_failures: 7, keep_checkpoints: 6\b", " ".join(done.stdout.split()))
