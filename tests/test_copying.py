"""What was copied to a store can be gone on from at every moment, and is whole."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from written import FIRST, all_of, begin, evaluate

from umbrella.config import SETTINGS
from umbrella.shared_store import SharedStore
from umbrella.training.copying import Copy, bring
from umbrella.training.filenames import BEGUN
from umbrella.training.history import read_history
from umbrella.training.progress import checkpoint_folder, delete, latest_checkpoint, what_is_wrong


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


def test_what_arrives_is_what_was_sent_and_rests_locks_and_the_state_of_the_moment_stay(
    address: str, tmp_path: Path
) -> None:
    folder = begin(tmp_path / "home" / FIRST)
    evaluate(folder, 1)
    for name in ("live.json", ".hidden", "rest.partial", "tracking/sqlite/outbox.lock"):
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
        if file.is_file() and file.name not in ("live.json", ".hidden", "rest.partial", "outbox.lock")
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
