"""The command line: flags, files and overrides become settings, and a user's error is one line and status 2."""

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from rich.table import Table

from umbrella.base import UserError, note
from umbrella.cli import FLAGS, Arguments, Options, make_console, parse, progress_bar, run_command
from umbrella.commands import completion
from umbrella.config import READY, Loader, Settings, find_settings_file
from umbrella.settings_help import json_schema, list_settings


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


def test_a_setting_may_be_written_as_an_option() -> None:
    args = parse(["--optim.lr", "3e-4", "--seed=2", "--tune.space.optim.clip", "{grid: [1, 2]}", "--dry-run"], "")
    assert (args.settings.optim.lr, args.settings.seed, args.dry_run) == (3e-4, 2, True)
    assert args.settings.tune.space == {"optim.clip": {"grid": [1, 2]}}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim.lr", "--dry-run"], "--optim.lr: needs a value, as in --optim.lr VALUE"),
        (["--optim.lrr", "1"], "optim.lrr: there is no such setting; did you mean optim.lr?"),
        (["optim.lr", "3e-4"], "optim.lr: is a setting, not a file; write optim.lr=3e-4"),
        (["grid_97.yaml"], "grid_97.yaml: cannot be read: No such file or directory; ready settings files: "),
        (
            ["tune.space.optim.lr=[1e-3, 1e-4]"],
            "tune.space.optim.lr=[1e-3, 1e-4]: Input should be a valid dictionary;"
            " write 'tune.space.optim.lr={grid: [1e-3, 1e-4]}' to try each value",
        ),
        (["--help", "optimizer"], "--help optimizer: there is no such section or setting; the sections are general, "),
    ],
)
def test_a_mistake_on_the_command_line_is_an_error_with_its_correction(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(argv, "")
    assert str(raised.value).startswith(message)


def test_help_shows_one_section_with_types_and_the_values_of_the_commands_own_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(["--help", "tune"], "", default_file=str(READY / "tune.yaml"))
    printed = capsys.readouterr().out
    assert "  tune.grace  integer >= 1  (default: 6)\n" in printed
    assert "  tune.mode  max | min  (default: max)\n" in printed
    assert "optim" not in printed.split("tune.space")[0]


def test_ready_settings_files_are_found_by_name_and_match_the_schema() -> None:
    schema = json.loads((READY / "settings.schema.json").read_text(encoding="utf-8"))
    assert schema == json_schema(), "write it again: umbrella schema > ray_configs/settings.schema.json"
    checker = Draft202012Validator(schema)
    files = [file for file in READY.glob("*.yaml") if "$schema=settings.schema.json" in file.read_text("utf-8")]
    assert len(files) == 9
    for file in files:
        assert find_settings_file(file.name) == find_settings_file(f"ray_configs/{file.name}").resolve() == file
        checker.validate(yaml.load(file.read_text(encoding="utf-8"), Loader))
    with pytest.raises(ValidationError):
        checker.validate({"optim": {"lr": "fast"}})


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("umbrella tu", ["tune"]),
        ("umbrella tune optim.l", ["optim.lr="]),
        ("umbrella tune mask.supervise=la", ["mask.supervise=last_assistant"]),
        ("umbrella tune --res", ["--resume"]),
        ("umbrella tune grid_9", ["grid_96.yaml"]),
    ],
)
def test_the_shell_completes_commands_options_settings_values_and_files(
    line: str, found: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    completion.run([])
    script = capsys.readouterr().out
    words = f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_CWORD={line.count(' ')} COMP_WORDBREAKS=' '"
    command = f'compopt() {{ :; }}\n{script}\n{words}; _umbrella; echo "${{COMPREPLY[@]}}"'
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout.split() == found


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
    assert parse(["task-id=7", "seed=1"], "", options=OPTIONS).options["task_id"] == "7"
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
    assert parse(["model", "a.nii", "Is x=3 true?"], "", paths="volume").paths == ("model", "a.nii", "Is x=3 true?")


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
