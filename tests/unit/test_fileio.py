"""Storage that cannot be written: said in one line before anything starts, and known in what libraries make of it."""

import csv
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sqlalchemy import create_engine, text

from umbrella.base import UserError
from umbrella.fileio import check_writable, describe_storage_error, write_csv


def write_torch(folder: Path) -> None:
    with (folder / "state.pt").open("wb") as file:
        torch.save(torch.zeros(100_000), file)


def write_sqlite(folder: Path) -> None:
    with sqlite3.connect(folder / "mlflow.db") as database:
        database.execute("CREATE TABLE runs AS SELECT zeroblob(400000)")


def write_sqlalchemy(folder: Path) -> None:
    with create_engine(f"sqlite:///{folder}/mlflow.db").begin() as connection:
        connection.execute(text("CREATE TABLE runs AS SELECT zeroblob(400000)"))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "python": lambda folder: (folder / "log").write_bytes(bytes(400_000)),
    "safetensors": lambda folder: save_file({"w": torch.zeros(100_000)}, folder / "w.safetensors"),
    "torch": write_torch,
    "sqlite": write_sqlite,
    "sqlalchemy": write_sqlalchemy,
    "check": lambda folder: check_writable(folder, "it"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_known_whoever_meets_it(name: str, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(50_000)
    with pytest.raises(Exception) as caught:  # noqa: PT011  each library has its own
        WRITERS[name](disk)
    said = str(caught.value) if isinstance(caught.value, UserError) else describe_storage_error(caught.value)
    assert "No space left on device" in said or "database or disk is full" in said


@pytest.mark.parametrize("name", ["python", "safetensors", "torch", "sqlite", "sqlalchemy"])
def test_a_folder_that_is_gone_is_known_too(name: str, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        WRITERS[name](tmp_path / "gone")
    assert any(words in describe_storage_error(caught.value) for words in ("No such file", "unable to open"))


def test_other_errors_are_nobodys_storage() -> None:
    for error in (
        ValueError("x"),
        ConnectionRefusedError(111, "refused"),
        sqlite3.OperationalError("database is locked"),
    ):
        assert describe_storage_error(error) == ""


def test_storage_that_cannot_be_written_ends_a_script_before_it_begins(
    run: Callable[..., Any], small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "runs"
    for script in ("train.py", "tune.py"):
        done = run(script, f"resources.storage={folder}")
        why = f"error: resources.storage={folder} cannot be written to: Not a directory: {folder}\n"
        assert (done.status, done.stderr) == (2, why)
    disk = small_disk(1 << 19)
    done = run("train.py", f"resources.storage={disk}")
    assert done.status == 2
    assert done.stderr.splitlines()[-1].startswith("error: No space left on device")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    done = run("train.py", f"resources.storage={disk}")
    assert done.status == 2
    assert f"resources.storage={disk} cannot be written to: Read-only file system" in done.stderr


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+SUM(A1)", "'+SUM(A1)"),
        ("-A1", "'-A1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", r"\r=1"),
        ("\n=1", "'\n=1"),
        ("＝1+1", "'＝1+1"),
        (-0.5, "-0.5"),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        ("female", "female"),
        ("a = b", "a = b"),
        ("\x1b[31mred\x9b\u202eleft", r"\x1b[31mred\x9b\u202eleft"),
        (None, ""),
    ],
)
def test_a_table_holds_no_formula_and_no_escape_sequence_and_numbers_stay_numbers(
    tmp_path: Path, value: Any, cell: str
) -> None:
    write_csv(tmp_path / "a.csv", [str(value), "b"], iter([[value, 1.5]]))
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        header, row = csv.reader(file)
    assert row == [cell, "1.5"]
    assert header[0] == (cell or "None")
