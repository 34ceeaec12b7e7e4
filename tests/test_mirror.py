"""What lies in a mirror can be gone on from at every moment, by one machine at a time; its failures end no training."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import EXPERIMENTS

from umbrella import shared_store
from umbrella.base import UserError
from umbrella.config import SETTINGS, load_settings
from umbrella.shared_store import SharedStore
from umbrella.training import mirror as rooms
from umbrella.training.copying import Copy, bring
from umbrella.training.filenames import BEGUN
from umbrella.training.history import read_history
from umbrella.training.mirror import Mirror, in_mirror, mirrored
from umbrella.training.progress import (
    METRICS,
    PROGRESS,
    checkpoint_folder,
    delete,
    latest_checkpoint,
    what_is_wrong,
    write_files,
)
from umbrella.training.settings import ResourceSettings
from umbrella.tuning import adoption
from umbrella.tuning.question import Question, write_question

FIRST = "trainings/first"


class Lost(Exception):
    """The machine is gone."""


class Fragile(SharedStore):
    """A store whose machine is lost at a given change."""

    left = 10**9

    def put(self, *about: Any) -> None:
        self._change()
        super().put(*about)

    def delete(self, name: str) -> None:
        self._change()
        super().delete(name)

    def _change(self) -> None:
        if self.left == 0:
            raise Lost
        self.left -= 1


@pytest.fixture(params=["file", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"file": f"file://{tmp_path}/mirror", "memory": f"memory://{uuid4().hex}"}[request.param]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds and waits that a test need not wait for."""
    for name, seconds in {"EVERY": 0.05, "SILENT": 0.5, "LAST_WAIT": 0.5}.items():
        monkeypatch.setattr(rooms, name, seconds)


def all_of(things: Any, what: str) -> Any:
    return things


def begin(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / BEGUN["trainings"]).write_text("{}", encoding="utf-8")
    return folder


def evaluate(folder: Path, step: int, writing: str = "a") -> Path:
    """What a training writes at an evaluation. ``writing``: stands in the checkpoint's files."""
    with (folder / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        print(json.dumps({"step": step}), file=file)
    partial = folder / f".step_{step}.partial"
    (partial / "adapter").mkdir(parents=True)
    for name in ("model.safetensors", "adapter/config", "state.pt"):
        (partial / name).write_text(f"{step} {writing}", encoding="utf-8")
    (partial / METRICS).write_text('{"eval/loss": 1}', encoding="utf-8")
    (partial / PROGRESS).write_text(json.dumps({"step": step}), encoding="utf-8")
    write_files(partial)
    checkpoint = checkpoint_folder(folder, step)
    if checkpoint.exists():
        delete(checkpoint)
    return partial.rename(checkpoint)


def in_step(checkpoint: Path) -> bool:
    """Whether a checkpoint's files are of one writing."""
    return len({file.read_text() for file in checkpoint.rglob("*") if file.is_file() and file.suffix != ".json"}) == 1


def trial_life(trial: Path, round_: Callable[[], None]) -> None:
    """Three evaluations, the second one's checkpoint written anew, the end, and pruning."""
    sweep = trial.parents[1]
    evaluate(trial, 1, "a")
    round_()
    evaluate(trial, 2, "a")
    round_()
    evaluate(trial, 2, "b")
    round_()
    evaluate(trial, 3, "a")
    (trial / "end.json").write_text('{"state": "finished"}', encoding="utf-8")
    (sweep / "experiment_state-1.json").write_text('{"ended": 1}', encoding="utf-8")
    delete(checkpoint_folder(trial, 1))
    delete(checkpoint_folder(trial, 2))
    round_()


def test_at_whatever_moment_the_machine_is_lost_another_one_goes_on_with_whole_checkpoints(tmp_path: Path) -> None:
    """So many changes; at each the machine is lost once."""
    changes, seen = 0, set()
    while True:
        home, away, store = (tmp_path / f"{name}-{changes}" for name in ("home", "away", "store"))
        trial = home / "sweeps/s/trials/t"
        trial.mkdir(parents=True)
        (home / "sweeps/s" / SETTINGS).write_text("a: 1", encoding="utf-8")
        fragile = Fragile(str(store))
        fragile.left = changes
        copy = Copy(fragile, home, "sweeps/s", SETTINGS)
        lost = False
        try:
            trial_life(trial, copy.round)
        except Lost:
            lost = True
        if "sweeps/s/settings.yaml" in SharedStore(str(store)).sizes("sweeps/s"):
            bring(SharedStore(str(store)), "sweeps/s", SETTINGS, away / "sweeps/s", all_of)
            there = away / "sweeps/s/trials/t"
            steps = sorted(there.glob("step_*"))
            assert steps, "once the sweep is there, a checkpoint is"
            for checkpoint in steps:
                assert what_is_wrong(checkpoint) == ""
                assert in_step(checkpoint)
            latest = latest_checkpoint(there)
            assert latest is not None
            step = int(latest.name.removeprefix("step_"))
            assert {row["step"] for row in read_history(there)} >= set(range(1, step + 1)), "what no one would do again"
            if (there / "end.json").exists():
                assert step == 3
            if (away / "sweeps/s/experiment_state-1.json").exists():
                assert (there / "end.json").exists()
            seen.add(step)
        if not lost:
            break
        changes += 1
    assert changes > 20
    assert seen == {1, 2, 3}


def population_life(trials: Path, copy: Copy, rounds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two trials one adopts at the first evaluation. ``rounds``: when there are some, besides the last one."""

    own = evaluate(trials / "taker", 1, "taker")
    evaluate(trials / "giver", 1, "giver")
    if "measured" in rounds:
        copy.round()
    with monkeypatch.context() as killed:  # between note and checkpoint
        killed.setattr(adoption, "_take", lambda folder, step: None)
        adoption.adopt(trials / "taker", trials / "giver", {"lr": 1}, {"lr": 2}, {"lr": 3})
    if "noted" in rounds:
        copy.round()
    adoption.settle(trials / "taker")
    if "taken" in rounds:
        copy.round()
    evaluate(trials / "taker", 2, "taker")
    delete(own)
    copy.round()


@pytest.mark.parametrize("rounds", ["measured noted taken", "measured", "noted taken"])
def test_at_whatever_moment_the_machine_is_lost_a_trials_weights_are_those_that_its_note_tells_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: str
) -> None:
    changes, seen, lost = 0, set(), True
    while lost:
        home, away, store = (tmp_path / f"{name}-{changes}" for name in ("home", "away", "store"))
        for name in ("taker", "giver"):
            (home / "sweeps/s/trials" / name).mkdir(parents=True)
        (home / "sweeps/s" / SETTINGS).touch()
        fragile = Fragile(str(store))
        fragile.left, lost = changes, False
        try:
            copy = Copy(fragile, home, "sweeps/s", SETTINGS)
            population_life(home / "sweeps/s/trials", copy, rounds, monkeypatch)
        except Lost:
            lost = True
        if "sweeps/s/settings.yaml" in SharedStore(str(store)).sizes("sweeps/s"):
            bring(SharedStore(str(store)), "sweeps/s", SETTINGS, away / "sweeps/s", all_of)
            taker = away / "sweeps/s/trials/taker"
            adoption.settle(taker)
            latest = latest_checkpoint(taker)
            adopted = [told.step for told in adoption.read_adoptions(taker)]
            weights = (latest / "model.safetensors").read_text() if latest else ""
            seen.add((weights, *adopted))
        changes += 1
    between = {("1 taker",)} if "measured" in rounds else set()
    between |= {("1 giver", 1)} if "taken" in rounds else set()
    assert seen == {("",), ("2 taker", 1)} | between


def test_what_arrives_is_what_was_sent_and_rests_locks_and_the_state_of_the_moment_stay(
    address: str, tmp_path: Path
) -> None:
    folder = begin(tmp_path / "home" / FIRST)
    evaluate(folder, 1)
    for name in ("lock", "live.json", ".hidden", "rest.partial", "tracking/sqlite/outbox.lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "empty.txt").touch()
    (folder / "tracking/sqlite/run.json").write_text("{}", encoding="utf-8")
    store = SharedStore(address)
    Copy(store, tmp_path / "home", FIRST, BEGUN["trainings"]).round()
    stamps = bring(store, FIRST, BEGUN["trainings"], tmp_path / "away" / FIRST, all_of)
    sent = {
        file.relative_to(folder): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in ("lock", "live.json", ".hidden", "rest.partial", "outbox.lock")
    }
    away = tmp_path / "away" / FIRST
    assert {file.relative_to(away): file.read_bytes() for file in away.rglob("*") if file.is_file()} == sent
    assert {Path(name).relative_to(FIRST) for name in stamps} == set(sent)


def test_nothing_is_copied_twice_and_what_is_gone_here_leaves_but_never_the_last_checkpoint(
    address: str, tmp_path: Path
) -> None:
    folder, store = begin(tmp_path / FIRST), Fragile(address)
    copy = Copy(store, tmp_path, FIRST, BEGUN["trainings"])
    first = evaluate(folder, 1)
    (folder / "outbox.jsonl").touch()
    copy.round()
    store.left = 0
    copy.round()
    store.left = 10**9
    (folder / "outbox.jsonl").unlink()
    delete(first)
    copy.round()
    there = set(store.sizes(FIRST))
    assert f"{FIRST}/outbox.jsonl" not in there
    assert f"{FIRST}/step_0000001/files.json" in there
    evaluate(folder, 2)
    copy.round()
    assert {name.split("/")[2] for name in store.sizes(FIRST)} == {
        "begun_with.json",
        "evaluations.jsonl",
        "step_0000002",
    }
    (folder / "step_0000002" / "state.pt").unlink()  # broken here, and whole there
    evaluate(folder, 3)
    copy.round()
    assert f"{FIRST}/step_0000002/state.pt" in store.sizes(FIRST)


def test_half_of_one_of_rays_notes_waits_until_it_is_whole(address: str, tmp_path: Path) -> None:
    folder, store = tmp_path / "sweeps/s", SharedStore(address)
    folder.mkdir(parents=True)
    (folder / SETTINGS).touch()
    halves = {"experiment_state-1.json": b'{"trials": [', "basic-variant-state-1.json": pickle.dumps([1, 2])[:-3]}
    for name, content in halves.items():
        (folder / name).write_bytes(content)
    copy = Copy(store, tmp_path, "sweeps/s", SETTINGS)
    copy.round()
    assert set(store.sizes("sweeps/s")) == {"sweeps/s/settings.yaml"}
    (folder / "experiment_state-1.json").write_bytes(b'{"trials": []}')
    (folder / "basic-variant-state-1.json").write_bytes(pickle.dumps([1, 2]))
    copy.round()
    assert set(store.sizes("sweeps/s")) == {f"sweeps/s/{name}" for name in (*halves, SETTINGS)}


def test_a_folder_that_vanishes_deletes_nothing_in_the_mirror(address: str, tmp_path: Path) -> None:
    folder, store = begin(tmp_path / FIRST), SharedStore(address)
    evaluate(folder, 1)
    copy = Copy(store, tmp_path, FIRST, BEGUN["trainings"])
    copy.round()
    before = store.sizes(FIRST)
    shutil.rmtree(folder)
    copy.round()
    assert store.sizes(FIRST) == before


def test_a_checkpoint_that_is_pruned_while_it_is_copied_arrives_whole_and_leaves_once_the_next_one_is_there(
    address: str, tmp_path: Path
) -> None:
    folder = begin(tmp_path / "home" / FIRST)
    first = evaluate(folder, 1)

    class Slow(SharedStore):
        def put(self, name: str, *about: Any) -> None:
            if "step_0000001" in name and first.exists():
                evaluate(folder, 2)
                delete(first)
            super().put(name, *about)

    copy = Copy(Slow(address), tmp_path / "home", FIRST, BEGUN["trainings"])
    copy.round()
    bring(SharedStore(address), FIRST, BEGUN["trainings"], tmp_path / "away" / FIRST, all_of)
    assert latest_checkpoint(tmp_path / "away" / FIRST) == tmp_path / "away" / FIRST / first.name
    copy.round()
    assert {name.split("/")[2] for name in SharedStore(address).sizes(FIRST) if "/step_" in name} == {"step_0000002"}
    if address.startswith("file"):
        assert not Path(address.removeprefix("file://"), FIRST, first.name).exists(), "nor its empty folder"
    assert not list(folder.glob(".step_*")), "no rests"


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
    monkeypatch.setattr(rooms, "SILENT", 30.0)  # it gives a sign much sooner
    evaluate(begin(one / FIRST), 1)
    running = Mirror(resources(one, address), one / FIRST).open(all_of)
    with running:
        until(lambda: running.there)
        with pytest.raises(UserError, match=r"is being copied there from .*; stop it there"):
            Mirror(resources(two, address), two / FIRST).open(all_of)
    assert not (two / FIRST).exists()

    monkeypatch.setattr(rooms, "SILENT", 0.2)
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
    monkeypatch.setattr(rooms, "SILENT", 30.0)  # it gives a sign much sooner
    with mirrored(resources(tmp_path / "one", address), tmp_path / "one" / FIRST, all_of):
        until(lambda: SharedStore(address).sizes(FIRST))
        with pytest.raises(UserError, match=r"is being copied there from .*; stop it there"):
            Mirror(resources(tmp_path / "two", address), tmp_path / "two" / FIRST).open(all_of)
    assert not list(tmp_path.glob("*/trainings"))
    assert SharedStore(address).sizes(FIRST) == {}, "nothing was begun"


@pytest.mark.parametrize("at", ["put", "delete"])
def test_one_that_is_taken_over_in_the_midst_of_a_round_changes_nothing_more_and_leaves_the_mirror_to_the_other(
    at: str, address: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(rooms, "SILENT", 0.2)
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
    assert takers[0].owner()["session"] == takers[0].session
    assert takers[0]._round(), "it goes on"
    said = capsys.readouterr().err
    assert said.count("nothing more is copied from here") == 1
    assert "tried again" not in said
    contents = [SharedStore(address).read(f"{FIRST}/{name}") for name in ("a.txt", "b.txt")]
    assert contents.count(b"") >= 1, "no change but the one that hung, at most"


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_mirror_that_fails_for_a_while_is_said_once_and_catches_up(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place, folder, said = tmp_path / "mirror", tmp_path / "home" / FIRST, list[str]()

    def says(words: str) -> bool:
        said.append(capsys.readouterr().err)
        return words in "".join(said)

    with mirrored(resources(tmp_path / "home", str(place)), folder, all_of):
        evaluate(begin(folder), 1)
        until(lambda: (place / FIRST / "begun_with.json").exists())
        place.rename(tmp_path / "unplugged")
        place.touch()  # nothing can be written below a file
        evaluate(folder, 2)
        until(lambda: says("tried again"))
        time.sleep(0.3)
        place.unlink()
        (tmp_path / "unplugged").rename(place)
        until(lambda: what_is_wrong(place / FIRST / "step_0000002") == "")
        until(lambda: says("works again"))
    assert not says("not once more")
    assert "".join(said).count("not copied for now, and tried again") == 1
    assert "".join(said).count("\n") == 2


def test_at_the_end_a_mirror_that_is_gone_or_hangs_is_waited_for_so_long_and_what_is_left_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place, folder = tmp_path / "mirror", tmp_path / "home" / FIRST

    def train() -> None:
        with mirrored(resources(tmp_path / "home", str(place)), folder, all_of):
            evaluate(begin(folder), 1)
            until(lambda: (place / FIRST / "begun_with.json").exists())
            shutil.rmtree(place)
            place.touch()
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

    place.unlink()
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
    done = run(*words, f"resources.storage={tmp_path}", "resources.mirror=nosuch://user:secret@bucket/runs")
    assert done.status == 2
    assert done.stderr.startswith("error: resources.mirror=nosuch://***@bucket/runs: ")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
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
    assert set(in_mirror(resources(home, address), "sweeps")) == {"known"}
    said = capsys.readouterr().err
    assert (said.count("\n"), said.endswith(": by_hand\n")) == (1, True)
    with pytest.raises(UserError, match=r"sweeps/by_hand is there, but no \.mirror\.json"):
        Mirror(resources(home, address), home / "sweeps/by_hand").open(all_of)
    assert not (home / "sweeps/by_hand").exists()


def test_what_is_sent_or_waits_is_read_before_what_waits(address: str, tmp_path: Path) -> None:
    """A step is told of between two reads: run.json is older than the outbox then, and never the other way round."""
    folder = begin(tmp_path / FIRST)
    tracking = folder / "tracking/sqlite"
    tracking.mkdir(parents=True)
    (tracking / "run.json").write_text('{"until": 1}', encoding="utf-8")

    class Told(Copy):
        def _taken(self, names: Any) -> Any:
            names = list(names)
            found = super()._taken(names)
            if any(name.endswith(("run.json", "outbox.jsonl")) for name in names):
                (tracking / "outbox.jsonl").write_text('{"until": 2}', encoding="utf-8")
                (tracking / "run.json").write_text('{"until": 2}', encoding="utf-8")
            return found

    Told(SharedStore(address), tmp_path, FIRST, BEGUN["trainings"]).round()
    assert SharedStore(address).read(f"{FIRST}/tracking/sqlite/run.json") == b'{"until": 1}'
    assert SharedStore(address).read(f"{FIRST}/tracking/sqlite/outbox.jsonl") == b'{"until": 2}'


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


class Slow(BaseHTTPRequestHandler):
    """As much of S3 as an upload needs; it takes no part until it may."""

    may_take = threading.Event()
    asked = threading.Event()
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        kind = "InitiateMultipartUploadResult" if self.path.endswith("uploads") else "CompleteMultipartUploadResult"
        self.answer(f"<{kind}><UploadId>1</UploadId><ETag>1</ETag></{kind}>".encode())

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"] or 0)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                self.rfile.read(size + 2)
            self.rfile.readline()
        self.rfile.read(size)
        if "partNumber" in self.path:
            self.asked.set()
            self.may_take.wait(20)
        self.answer()

    def answer(self, content: bytes = b"") -> None:
        self.send_response(200)
        for name, value in {"ETag": '"1"', "Content-Length": str(len(content)), "Content-Type": "text/xml"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *unused: object) -> None:
        pass


def test_an_upload_to_s3_is_told_of_as_it_goes_on_and_not_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    (tmp_path / "weights").write_bytes(bytes(2**26))
    told: list[int] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = SharedStore(
            f"s3://bucket/runs?region=x&scheme=http&endpoint_override=127.0.0.1:{server.server_address[1]}"
        )
        upload = threading.Thread(target=store.put, args=("weights", tmp_path / "weights", told.append), daemon=True)
        upload.start()
        assert Slow.asked.wait(20)
        time.sleep(0.5)
        before = sum(told)
        Slow.may_take.set()
        upload.join(20)
        server.shutdown()
    assert before < 2**25
    assert sum(told) == 2**26
