"""The command line: flags, files and overrides land in the settings, and a user's error is one line and status 2."""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from umbrella.base import UserError, note
from umbrella.cli import FLAGS, Arguments, Option, make_console, parse, progress_bar, run_script
from umbrella.config import describe_settings


def test_every_flag_lands_in_the_setting_that_it_names() -> None:
    values: dict[str, Any] = {
        "--train-data": "a.json",
        "--eval-data": "b.json",
        "--modality": "sMRI",
        "--task-filter": "T1",
        "--batch-size": 3,
        "--learning-rate": 0.00005,
        "--epochs": 2,
        "--output-dir": "/out",
    }
    assert values.keys() == FLAGS.keys()
    argv = [word for flag, value in values.items() for word in (flag, str(value))]
    args = parse(argv, "")
    settings = args.settings.flat()
    paths = {"--train-data": ["a.json"], "--eval-data": ["b.json"]}
    assert {flag: settings[name] for flag, name in FLAGS.items()} == values | paths
    assert args.given == {
        "data.train",
        "data.validation",
        "data.modality",
        "data.task_filter",
        "train.batch_size",
        "optim.lr",
        "train.epochs",
        "resources.storage",
    }


def test_words_with_an_equals_sign_are_overrides_and_others_are_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\nexperiment: first\n")
    second.write_text("seed: 2\n")
    argv = [str(first), "data.task_filter=a=b", "--dry-run", "modalities.sMRI.grid=[48, 48, 48]", str(second)]
    args = parse(argv, "")
    assert (args.settings.seed, args.settings.experiment, args.dry_run) == (2, "first", True)
    assert args.settings.data.task_filter == "a=b"
    assert args.settings.modalities["sMRI"].grid == (48, 48, 48)
    assert args.given == {"data.task_filter", "modalities.sMRI.grid"}


def test_the_default_question_is_asked_unless_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    default, other, own, none = (tmp_path / f"{name}.yaml" for name in ("default", "other", "own", "none"))
    default.write_text("seed: 1\ntune: {space: {optim.lr: {grid: [1, 2]}}}\n")
    other.write_text("seed: 2\ntune: {grace: 3}\n")
    own.write_text("tune: {space: {train.epochs: {grid: [1, 2]}}}\n")
    none.write_text("tune: {space: {}}\n")

    def read(*argv: str | Path) -> tuple[int, list[str]]:
        settings = parse([str(word) for word in argv], "", str(default)).settings
        return settings.seed, list(settings.tune.space)

    assert read("train.epochs=3") == (1, ["optim.lr"])
    assert read(other) == read("--config", other) == (2, ["optim.lr"])
    assert read(other, own) == (2, ["train.epochs"])
    assert read(none) == (0, [])
    assert parse([str(other)], "", str(default)).files == [str(other)], "what was named"


def test_help_prints_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--help"], "What this script does.")
    printed = capsys.readouterr().out
    assert left.value.code == 0
    assert "What this script does." in printed
    assert [name for name, _, line in describe_settings() if f"  {name} = " not in printed or line not in printed] == []
    assert [flag for flag in FLAGS if flag not in printed] == []


OWN = (
    Option("--task-id", "which one", value="ID"),
    Option("--sample", "its number", kind=int),
    Option("--split", "where from", "train", choices=("train", "test")),
    Option("--prune", "delete", default=False),
)


def test_a_script_may_have_flags_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([], "").options == {}
    assert parse([], "", options=OWN).options == {"task_id": None, "sample": None, "split": "train", "prune": False}
    args = parse(["--sample", "3", "seed=1", "--prune", "--split", "test", "--task-id", "a=b"], "", options=OWN)
    assert args.options == {"task_id": "a=b", "sample": 3, "split": "test", "prune": True}
    assert (args.given, args.settings.seed) == ({"seed"}, 1)
    with pytest.raises(SystemExit) as left:
        parse(["--help"], "", options=OWN)
    printed = capsys.readouterr().out
    assert left.value.code == 0
    for words in ("--task-id ID", "--sample VALUE", "--split {train,test}", "--prune  ", "which one", "--dry-run"):
        assert words in printed
    for wrong in (["--split", "x"], ["--sample", "x"], ["--prune=1"]):
        with pytest.raises(SystemExit) as left:
            parse(wrong, "", options=OWN)
        assert left.value.code == 2


def test_a_script_that_takes_files_tells_them_from_settings(tmp_path: Path) -> None:
    settings = tmp_path / "a.YML"
    settings.write_text("seed: 1\n")
    argv = ["b.nii.gz", str(settings), "experiment=c.nii", "sub=1/d.nii.gz", "--modality", "sMRI", "/s/sub=1/e.mgz"]
    own = [Option("--modality", "of the volumes")]
    with pytest.raises(UserError, match="sub: there is no such setting"):
        parse(argv, "", options=own, paths="volume")
    argv.remove("sub=1/d.nii.gz")
    args = parse(argv, "", options=own, paths="volume")
    assert args.paths == ("b.nii.gz", "/s/sub=1/e.mgz")
    assert (args.settings.seed, args.settings.experiment) == (1, "c.nii")
    # A flag of the script's own hides the shared one of that name.
    assert (args.options, args.settings.data.modality) == ({"modality": "sMRI"}, "")


def test_without_a_terminal_what_takes_long_says_how_fast_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbrella.cli.PROGRESS_INTERVAL", 0.0)
    assert list(progress_bar(range(3), "counting")) == [0, 1, 2]
    assert re.search(r"^counting 2/3, \S+ per second$", capsys.readouterr().out, re.M)


def test_a_bar_gives_the_things_that_it_was_given_and_is_not_drawn_for_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (list(progress_bar([], "nothing")), capsys.readouterr().out) == ([], "")
    assert list(progress_bar([3, 1, 2], "counting")) == [3, 1, 2]
    assert "counting" in capsys.readouterr().out


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def run(main: Callable[[Arguments], Any], *argv: str) -> None:
        monkeypatch.setattr("sys.argv", ["script.py", *argv])
        run_script(main, "")

    return run


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("optim.lr=0", "error: optim.lr=0: Input should be greater than 0\n"),
        ("optim.lt=1", "error: optim.lt: there is no such setting; did you mean optim.lr?\n"),
        ("seed=[1", "error: seed=[1: the value is not YAML; quote it, as in 'seed=[1, 2]'\n"),
        ("/no/such.yaml", "error: /no/such.yaml: cannot be read: No such file or directory\n"),
    ],
)
def test_a_users_error_is_one_line_on_stderr_and_status_2(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str], word: str, line: str
) -> None:
    with pytest.raises(SystemExit) as left:
        run(lambda request: pytest.fail("main was called"), word)
    assert (left.value.code, *capsys.readouterr()) == (2, "", line)


def test_a_users_error_inside_the_script_has_no_traceback_either(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(args: Arguments) -> None:
        raise UserError("volume.nii: cannot be read")

    with pytest.raises(SystemExit) as left:
        run(main)
    assert (left.value.code, capsys.readouterr().err) == (2, "error: volume.nii: cannot be read\n")


def test_escape_sequences_in_texts_do_not_reach_the_terminal(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(args: Arguments) -> None:
        table = Table("a\x1b[2J", title="b\x1b[2J")
        table.add_row("c\x1b[2J")
        make_console().print("d\x1b[2J", table)
        note("e\x1b[2J")
        raise UserError("f\x1b[2J\x9b2J")

    with pytest.raises(SystemExit):
        run(main)
    printed = "".join(capsys.readouterr())
    assert not {"\x1b", "\x9b"} & set(printed)
    assert all(rf"{letter}\x1b[2J" in printed for letter in "abcdef")


def test_sigterm_ends_a_script_in_one_line_and_status_143_whatever_it_is_at(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(args: Arguments) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    with pytest.raises(SystemExit) as left:
        run(main)
    assert (left.value.code, capsys.readouterr().err) == (143, "stopped by SIGTERM\n")


def test_a_bug_is_not_dressed_up_as_a_users_error(run: Callable[..., Any]) -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda request: 1 / 0)
