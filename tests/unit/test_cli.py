"""The command line: flags, files and overrides become settings, and a user's error is one line and status 2."""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from umbrella.base import UserError, note
from umbrella.cli import FLAGS, Arguments, Options, make_console, parse, progress_bar, run_command
from umbrella.config import Settings
from umbrella.settings_help import list_settings


@pytest.mark.parametrize(
    ("flag", "text", "name", "value"),
    [
        ("--train-data", "a.json", "data.train", ["a.json"]),
        ("--eval-data", "b.json", "data.validation", ["b.json"]),
        ("--modality", "sMRI", "data.modality", "sMRI"),
        ("--task-filter", "T1", "data.task_filter", "T1"),
        ("--batch-size", "3", "train.batch_size", 3),
        ("--learning-rate", "5e-5", "optim.lr", 5e-5),
        ("--epochs", "2", "train.epochs", 2),
        ("--output-dir", "/out", "resources.storage", "/out"),
    ],
)
def test_each_flag_sets_its_setting(flag: str, text: str, name: str, value: Any) -> None:
    args = parse([flag, text], "")
    assert (args.settings.flat()[name], args.given) == (value, {name})


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


def test_the_default_search_space_is_used_unless_a_file_has_one(tmp_path: Path) -> None:
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
    assert parse([str(other)], "", str(default)).files == [str(other)], "without the default file"


OPTIONS: Options = {
    "--task-id": {"help": "which one"},
    "--sample": {"help": "its number", "type": int},
    "--prune": {"help": "delete", "action": "store_true"},
}


def test_a_script_has_options_of_its_own() -> None:
    assert parse([], "", options=OPTIONS).options == {"task_id": None, "sample": None, "prune": False}
    args = parse(["--sample", "3", "seed=1", "--prune", "--task-id", "a=b"], "", options=OPTIONS)
    assert args.options == {"task_id": "a=b", "sample": 3, "prune": True}
    assert (args.given, args.settings.seed) == ({"seed"}, 1)
    with pytest.raises(SystemExit) as left:
        parse(["--sample", "x"], "", options=OPTIONS)
    assert left.value.code == 2


def test_help_has_every_setting_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--help"], "What this script does.", options=OPTIONS)
    printed = capsys.readouterr().out
    assert left.value.code == 0
    words = " ".join(printed.split())
    settings = list_settings(Settings())
    assert [e.name for e in settings if f" {e.name} {e.kind} " not in words or e.description not in words] == []
    assert [text for text in ("What this script does.", *FLAGS, *OPTIONS, "--dry-run") if text not in printed] == []


def test_a_script_that_accepts_files_tells_them_from_settings(tmp_path: Path) -> None:
    settings = tmp_path / "a.YML"
    settings.write_text("seed: 1\n")
    own: Options = {"--modality": {"help": "of the volumes"}}
    with pytest.raises(UserError, match="sub: there is no such setting"):
        parse(["sub=1/d.nii.gz"], "", options=own, paths="volume")
    argv = ["b.nii.gz", str(settings), "experiment=c.nii", "--modality", "sMRI", "/s/sub=1/e.mgz"]
    args = parse(argv, "", options=own, paths="volume")
    assert args.paths == ("b.nii.gz", "/s/sub=1/e.mgz")
    assert (args.settings.seed, args.settings.experiment) == (1, "c.nii")
    assert (args.options, args.settings.data.modality) == ({"modality": "sMRI"}, ""), "replaces the shared flag"


def test_a_progress_bar_yields_the_items_and_prints_the_rate_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (list(progress_bar([], "nothing")), capsys.readouterr().out) == ([], "")
    monkeypatch.setattr("umbrella.cli.PROGRESS_INTERVAL", 0.0)
    assert list(progress_bar([3, 1, 2], "counting")) == [3, 1, 2]
    assert re.search(r"^counting 2/3, \S+ per second$", capsys.readouterr().out, re.M)


def fail(args: Arguments) -> None:
    raise UserError("volume.nii: cannot be read")


def receive_sigterm(args: Arguments) -> None:
    signal.raise_signal(signal.SIGTERM)
    raise AssertionError("it went on")


@pytest.mark.parametrize(
    ("main", "word", "status", "line"),
    [
        (fail, "optim.lr=0", 2, "error: optim.lr=0: Input should be greater than 0\n"),
        (fail, "seed=[1", 2, "error: seed=[1: the value is not YAML; quote it, as in 'seed=[1, 2]'\n"),
        (fail, "seed=1", 2, "error: volume.nii: cannot be read\n"),
        (receive_sigterm, "seed=1", 143, "stopped by SIGTERM\n"),
    ],
)
def test_a_user_error_or_sigterm_ends_a_script_in_one_line(
    main: Callable[[Arguments], None],
    word: str,
    status: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        run_command("name", [word], main, "")
    assert (left.value.code, *capsys.readouterr()) == (status, "", line)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("name", [], lambda args: 1 / 0, "")


def test_escape_sequences_in_texts_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def main(args: Arguments) -> None:
        table = Table("a\x1b[2J", title="b\x1b[2J")
        table.add_row("c\x1b[2J")
        make_console().print("d\x1b[2J", table)
        note("e\x1b[2J")
        raise UserError("f\x1b[2J\x9b2J")

    with pytest.raises(SystemExit):
        run_command("name", [], main, "")
    printed = "".join(capsys.readouterr())
    assert not {"\x1b", "\x9b"} & set(printed)
    assert all(rf"{letter}\x1b[2J" in printed for letter in "abcdef")
