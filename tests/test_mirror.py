"""What lies in a mirror can be gone on from at every moment, by one machine at a time; its failures end no training."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import EXPERIMENTS
from written import FIRST, all_of, begin, evaluate

from umbrella import shared_store
from umbrella.base import UserError
from umbrella.config import SETTINGS, load_settings
from umbrella.shared_store import SharedStore
from umbrella.training import mirror as rooms
from umbrella.training import ownership
from umbrella.training.mirror import Mirror, mirrored, sweeps_in_mirror
from umbrella.training.progress import (
    checkpoint_folder,
    latest_checkpoint,
    what_is_wrong,
)
from umbrella.training.settings import ResourceSettings
from umbrella.tuning.question import Question, write_question


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds and waits that a test need not wait for."""
    monkeypatch.setattr(rooms, "EVERY", 0.05)
    monkeypatch.setattr(rooms, "LAST_WAIT", 0.5)
    monkeypatch.setattr(ownership, "SILENT", 0.5)


def resources(storage: Path, address: str) -> ResourceSettings:
    return ResourceSettings(storage=str(storage), mirror=address)


def test_another_machine_fetches_goes_on_and_the_first_one_is_refused(address: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with mirrored(resources(one, address), one / FIRST, all_of):
        evaluate(begin(one / FIRST), 1)
    fetched: list[str] = []

    def bar(things: Any, what: str) -> Any:
        fetched.extend([what, *things])
        return things

    with mirrored(resources(two, address), two / FIRST, bar):
        assert latest_checkpoint(two / FIRST) == checkpoint_folder(two / FIRST, 1)
        evaluate(two / FIRST, 2)
    assert fetched[0] == "fetching trainings/first"
    assert fetched[-1] == "trainings/first/begun_with.json"
    with pytest.raises(UserError, match=r"trainings/first went on elsewhere .*delete .*one/trainings/first") as refused:
        Mirror(resources(one, address), one / FIRST).open(all_of)
    assert "\n" not in str(refused.value)
    Mirror(resources(two, address), two / FIRST).open(all_of)
    shutil.rmtree(one / FIRST)
    Mirror(resources(one, address), one / FIRST).open(all_of)
    assert latest_checkpoint(one / FIRST) == checkpoint_folder(one / FIRST, 2)


def test_an_evaluation_that_another_machine_made_stays_in_the_mirror_beside_what_is_written_here(
    address: str, tmp_path: Path
) -> None:
    def evaluated(home: Path, *names: str) -> None:
        also = home / "evaluations/first"
        with mirrored(resources(home, address), home / FIRST, all_of, [also]):
            if not (home / FIRST).exists():
                begin(home / FIRST)
            for name in names:
                also.mkdir(parents=True, exist_ok=True)
                (also / name).write_text(home.name, encoding="utf-8")
            for file in set(also.glob("*")) - {also / name for name in names}:
                file.unlink()

    store, two = SharedStore(address), tmp_path / "two"
    evaluated(tmp_path / "one", "table.csv", "page.html")
    evaluated(two)
    assert set(store.sizes("evaluations")) == {f"evaluations/first/{name}" for name in ("table.csv", "page.html")}
    evaluated(two, "table.csv", "chart.html")
    assert store.read("evaluations/first/table.csv") == b"two"
    evaluated(two, "table.csv")
    assert set(store.sizes("evaluations")) == {f"evaluations/first/{name}" for name in ("table.csv", "page.html")}


def test_a_second_machine_is_refused_while_the_first_one_lives_and_one_that_was_taken_over_stops_copying(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(ownership, "SILENT", 30.0)  # it gives a sign much sooner
    evaluate(begin(one / FIRST), 1)
    running = Mirror(resources(one, address), one / FIRST).open(all_of)
    with running:
        until(lambda: running.there)
        with pytest.raises(UserError, match=r"is being copied there from .*; stop it there"):
            Mirror(resources(two, address), two / FIRST).open(all_of)
    assert not (two / FIRST).exists()

    monkeypatch.setattr(ownership, "SILENT", 0.2)
    first = Mirror(resources(one, address), one / FIRST).open(all_of)
    assert first._round()  # and then it hangs for long
    second = Mirror(resources(two, address), two / FIRST).open(all_of)
    assert second._round()
    capsys.readouterr()
    evaluate(one / FIRST, 2)
    assert not first._round()
    with first:
        pass
    assert capsys.readouterr().err.count("nothing more is copied from here") == 1
    assert f"{FIRST}/step_0000002/files.json" not in SharedStore(address).sizes(FIRST)
    assert second._round()


def test_of_two_that_begin_the_same_new_name_the_second_is_refused_before_the_first_has_written_anything(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "SILENT", 30.0)  # it gives a sign much sooner
    with mirrored(resources(tmp_path / "one", address), tmp_path / "one" / FIRST, all_of):
        until(lambda: is_written(address))
        with pytest.raises(UserError, match=r"is being copied there from .*; stop it there"):
            Mirror(resources(tmp_path / "two", address), tmp_path / "two" / FIRST).open(all_of)
    assert not list(tmp_path.glob("*/trainings"))
    assert SharedStore(address).sizes(FIRST) == {}, "nothing was begun"


@pytest.mark.parametrize("at", ["put", "delete"])
def test_one_that_is_taken_over_in_the_midst_of_a_round_changes_nothing_more_and_leaves_the_mirror_to_the_other(
    at: str, address: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(ownership, "SILENT", 0.2)
    for name in ("a.txt", "b.txt"):
        (begin(one / FIRST) if name == "a.txt" else one / FIRST).joinpath(name).touch()
    first = Mirror(resources(one, address), one / FIRST).open(all_of)
    assert first._round()
    for name in ("a.txt", "b.txt"):
        (one / FIRST / name).unlink() if at == "delete" else (one / FIRST / name).write_text("new", encoding="utf-8")
    takers: list[Mirror] = []
    change = getattr(SharedStore, at)

    def hanging(store: SharedStore, name: str, *about: Any) -> None:
        if store is first.store and name.endswith(".txt") and not takers:
            takers.append(Mirror(resources(two, address), two / FIRST).open(all_of))
            assert takers[0]._round()
        change(store, name, *about)

    monkeypatch.setattr(SharedStore, at, hanging)
    capsys.readouterr()
    assert not first._round()
    with first:
        pass
    assert takers[0].ownership.owner()["session"] == takers[0].ownership.session
    assert takers[0]._round(), "it goes on"
    said = capsys.readouterr().err
    assert said.count("nothing more is copied from here") == 1
    assert "tried again" not in said
    contents = [SharedStore(address).read(f"{FIRST}/{name}") for name in ("a.txt", "b.txt")]
    assert contents.count(b"") >= 1, "no change but the one that hung, at most"


def is_written(address: str) -> bool:
    """Whether there are files and all of them have content: a store may show a file before it has any."""
    sizes = SharedStore(address).sizes(FIRST)
    return bool(sizes) and all(sizes.values())


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def turn(link: Path, to: Path) -> None:
    """Let a link point elsewhere, in one moment: whoever writes there meanwhile finds the one place or the other."""
    new = link.with_name("new")
    new.symlink_to(to)
    new.replace(link)


def test_a_mirror_that_fails_for_a_while_is_said_once_and_catches_up(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place, folder, said = tmp_path / "mirror", tmp_path / "home" / FIRST, list[str]()
    disk, unplugged = tmp_path / "disk", tmp_path / "unplugged"
    disk.mkdir()
    unplugged.touch()  # nothing can be written below a file
    turn(place, disk)

    def says(words: str) -> bool:
        said.append(capsys.readouterr().err)
        return words in "".join(said)

    with mirrored(resources(tmp_path / "home", str(place)), folder, all_of):
        evaluate(begin(folder), 1)
        until(lambda: (place / FIRST / "begun_with.json").exists())
        turn(place, unplugged)
        evaluate(folder, 2)
        until(lambda: says("tried again"))
        time.sleep(0.3)
        turn(place, disk)
        until(lambda: what_is_wrong(place / FIRST / "step_0000002") == "")
        until(lambda: says("works again"))
    assert not says("not once more")
    assert "".join(said).count("not copied for now, and tried again") == 1
    assert "".join(said).count("\n") == 2


def test_at_the_end_a_mirror_that_is_gone_or_hangs_is_waited_for_so_long_and_what_is_left_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place, folder = tmp_path / "mirror", tmp_path / "home" / FIRST
    disk, unplugged = tmp_path / "disk", tmp_path / "unplugged"
    disk.mkdir()
    unplugged.touch()
    turn(place, disk)

    def train() -> None:
        with mirrored(resources(tmp_path / "home", str(place)), folder, all_of):
            evaluate(begin(folder), 1)
            until(lambda: (place / FIRST / "begun_with.json").exists())
            turn(place, unplugged)
            evaluate(folder, 2)
            raise KeyError

    began = time.monotonic()
    with pytest.raises(KeyError):  # what ends a training stays what it is
        train()
    assert time.monotonic() - began < 10
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("note: ")
    assert " of trainings/first not copied: resources.mirror=" in last
    assert last.endswith("the same command, with name=first, copies them")

    turn(place, disk)
    os.mkfifo(folder / "silent.txt")  # nobody ever writes to it: whoever reads, hangs
    began = time.monotonic()
    with mirrored(resources(tmp_path / "home", str(place)), folder, all_of):
        pass
    assert time.monotonic() - began < 10
    assert "does not answer; the same command" in capsys.readouterr().err
    with suppress(OSError):  # lets that thread go
        os.close(os.open(folder / "silent.txt", os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.parametrize(
    "words", [["train.py"], ["tune.py"], ["tune.py", "--resume", "one"], ["tune.py", "--resume", "last"]]
)
def test_a_mirror_that_cannot_be_reached_ends_a_script_in_one_line_before_anything_starts(
    run: Callable[..., Any], tmp_path: Path, words: list[str]
) -> None:
    done = run(*words, f"resources.storage={tmp_path}", "resources.mirror=nosuch://user@bucket/runs")
    assert done.status == 2
    assert done.stderr.startswith("error: resources.mirror=nosuch://***@bucket/runs: ")
    assert done.stderr.count("\n") == 1
    assert "user" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_that_cannot_be_written_or_is_the_storage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^resources.mirror=.*/file/runs: .*may you write there\?$"):
        Mirror(resources(tmp_path, f"{tmp_path}/file/runs"), tmp_path / FIRST).open(all_of)
    with pytest.raises(UserError, match=r"is resources\.storage itself"):
        Mirror(resources(tmp_path, f"file://{tmp_path}"), tmp_path / FIRST).open(all_of)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"is resources\.storage itself"):
        Mirror(resources(tmp_path, f"{tmp_path}/link"), tmp_path / FIRST).open(all_of)


def test_what_was_put_there_by_hand_is_left_out_and_not_fetched(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    home, sweep = tmp_path / "home", tmp_path / "home/sweeps/known"
    with mirrored(resources(home, address), sweep, all_of):
        sweep.mkdir(parents=True)
        (sweep / SETTINGS).touch()
    SharedStore(address).put(f"sweeps/by_hand/{SETTINGS}", b"a: 1")
    assert set(sweeps_in_mirror(resources(home, address))) == {"known"}
    said = capsys.readouterr().err
    assert (said.count("\n"), said.endswith(": by_hand\n")) == (1, True)
    with pytest.raises(UserError, match=r"sweeps/by_hand is there, but no \.mirror\.json"):
        Mirror(resources(home, address), home / "sweeps/by_hand").open(all_of)
    assert not (home / "sweeps/by_hand").exists()


@pytest.mark.parametrize("script", ["train.py", "prepare.py", "tune.py"])
def test_storage_that_is_an_address_is_refused_with_the_way_to_have_one(
    script: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(script, "resources.storage=s3://bucket/runs")
    assert done.status == 2
    assert done.stderr.count("\n") == 1
    assert "storage is a folder that is written to, not an address" in done.stderr
    assert "resources.mirror=s3://bucket/runs" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def sweep_elsewhere(tmp_path: Path, address: str) -> str:
    """The address of a mirror that has two sweeps, "first" and "second"."""
    home = tmp_path / "home"
    for name in ("first", "second"):
        folder = home / "sweeps" / name
        with mirrored(resources(home, address), folder, all_of):
            folder.mkdir(parents=True)
            settings = load_settings(overrides={"tune.space": {"optim.lr": {"grid": [1e-3, 1e-4]}}, "name": name})
            write_question(folder, Question(settings, frozenset()), "a" * 64)
        time.sleep(0.01)
    return address


def test_a_sweep_that_only_the_mirror_has_is_found_by_name_and_as_the_last_one(
    sweep_elsewhere: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    words = (f"resources.storage={tmp_path / 'away'}", f"resources.mirror={sweep_elsewhere}")
    for name in ("first", "last"):
        done = run("tune.py", "--resume", name, *words, "--dry-run")
        assert done.status == 0
        assert f"would fetch {tmp_path}/away/sweeps/{'second' if name == 'last' else name} from" in done.stdout
    assert not (tmp_path / "away").exists(), "a dry run fetches nothing"
    done = run("tune.py", "--resume", "third", *words)
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert "there is no sweep" in done.stderr
    assert done.stderr.endswith("has first, second\n")
    done = run("tune.py", "name=first", *words)
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert "there is such a sweep; go on with --resume first" in done.stderr


@pytest.mark.parametrize("address", ["file"], indirect=True)  # one in this process's memory is nobody else's
def test_what_a_scheduler_starts_on_a_new_machine_goes_on_with_the_sweep_of_the_mirror(
    sweep_elsewhere: str, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    stand_in = f'#!/bin/bash\nif [[ $1 == - ]]; then exec {sys.executable} "$@"; fi\necho "$@"\n'
    (tmp_path / "bin/python").write_text(stand_in)
    (tmp_path / "bin/python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "STORAGE": "/s"}

    def started(name: str, **more: str) -> str:
        words = [
            "bash",
            EXPERIMENTS.parent / "ray_configs/begin_or_resume.sh",
            name,
            "experiments/tune.py",
            "optim.lr=1",
        ]
        return subprocess.run(words, env=environment | more, capture_output=True, text=True, check=True).stdout.strip()

    mirror = f"resources.storage=/s resources.mirror={sweep_elsewhere}"
    assert started("second", MIRROR=sweep_elsewhere) == f"experiments/tune.py --resume second {mirror}"
    assert started("third", MIRROR=sweep_elsewhere) == f"experiments/tune.py optim.lr=1 {mirror} name=third"
    assert started("second") == "experiments/tune.py optim.lr=1 resources.storage=/s name=second"


def test_an_object_store_that_takes_calls_and_does_not_answer_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PATIENCE": 1, "TRIES": 1}.items():
        monkeypatch.setattr(shared_store, name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"s3://bucket/runs?region=x&scheme=http&endpoint_override=127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=r"^resources\.mirror=s3://bucket/runs.*Timeout was reached") as raised:
            Mirror(resources(tmp_path, place), tmp_path / FIRST).open(all_of)
    assert "\n" not in str(raised.value)
