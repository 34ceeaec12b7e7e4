"""Descriptions of storage errors, whichever library raises them; CSV tables without formulas."""

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
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_or_a_missing_folder_is_described_whatever_library_writes(
    name: str, small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    with pytest.raises(Exception) as missing:  # noqa: PT011  each library has its own
        WRITERS[name](tmp_path / "missing")
    assert any(text in describe_storage_error(missing.value) for text in ("No such file", "unable to open"))
    with pytest.raises(Exception) as full:  # noqa: PT011
        WRITERS[name](small_disk(50_000))
    assert any(text in describe_storage_error(full.value) for text in ("No space left", "database or disk is full"))


def test_other_errors_are_not_described_as_storage_errors() -> None:
    locked = sqlite3.OperationalError("database is locked")
    for error in (ValueError("x"), ConnectionRefusedError(111, "refused"), locked):
        assert describe_storage_error(error) == ""


def test_storage_that_cannot_be_written_ends_a_script_at_its_start(
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
    with pytest.raises(UserError, match=r"^it cannot be written to: Read-only file system"):
        check_writable(disk, "it")


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
def test_a_csv_table_has_no_formulas_and_no_escape_sequences(tmp_path: Path, value: Any, cell: str) -> None:
    write_csv(tmp_path / "a.csv", [str(value), "b"], iter([[value, 1.5]]))
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        header, row = csv.reader(file)
    assert row == [cell, "1.5"]
    assert header[0] == (cell or "None")
