"""What is uploaded of a training or sweep can be continued on another machine, whenever this one is lost."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from umbrella.base import UserError
from umbrella.config import load_settings
from umbrella.file_storage import FileStorage
from umbrella.paths import BEGUN, METRICS, PROGRESS, SETTINGS, checkpoint_folder
from umbrella.training import checkpoint_sync
from umbrella.training.checkpoint_files import (
    delete_checkpoint,
    find_damage,
    latest_checkpoint,
    mark_complete,
    read_history,
)
from umbrella.training.checkpoint_sync import CheckpointSync, download, is_uploaded, synced
from umbrella.training.settings import ResourceSettings

FIRST = "trainings/first"


def all_of(things: Any, what: str) -> Any:
    return things


def begin(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / BEGUN).write_text("{}", encoding="utf-8")
    return folder


def evaluate(folder: Path, step: int) -> Path:
    """Write the files of an evaluation and its checkpoint."""
    with (folder / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        print(json.dumps({"step": step}), file=file)
    checkpoint = checkpoint_folder(folder, step)
    (checkpoint / "adapter").mkdir(parents=True)
    for name in ("model.safetensors", "adapter/config", "state.pt"):
        (checkpoint / name).write_text(f"{step} {name}", encoding="utf-8")
    (checkpoint / METRICS).write_text('{"eval/loss": 1}', encoding="utf-8")
    (checkpoint / PROGRESS).write_text(json.dumps({"step": step}), encoding="utf-8")
    mark_complete(checkpoint)
    return checkpoint


class Lost(Exception):
    """The machine is gone."""


class Fragile(FileStorage):
    """A store whose machine is lost at a given change; ``after`` is called after each upload of a file."""

    left = 10**9

    def upload(self, name: str, *content: Any) -> None:
        self._change()
        super().upload(name, *content)
        self.after(name)

    def delete(self, name: str) -> None:
        self._change()
        super().delete(name)

    def after(self, name: str) -> None:
        pass

    def _change(self) -> None:
        if self.left == 0:
            raise Lost
        self.left -= 1


def resources(storage: Path, address: str) -> ResourceSettings:
    return load_settings(overrides={"resources.storage": str(storage), "resources.upload": address}).resources


def live(trial: Path, upload: Callable[[], None]) -> None:
    """Three evaluations, the end, and what is deleted on the way."""
    evaluate(trial, 1)
    upload()
    evaluate(trial, 2)
    delete_checkpoint(checkpoint_folder(trial, 1))
    upload()
    evaluate(trial, 3)
    (trial / "end.json").write_text('{"state": "finished"}', encoding="utf-8")
    (trial.parents[1] / "experiment_state-1.json").write_text('{"ended": 1}', encoding="utf-8")
    delete_checkpoint(checkpoint_folder(trial, 2))
    upload()


def test_whenever_the_machine_is_lost_another_one_continues_from_a_complete_checkpoint(tmp_path: Path) -> None:
    changes, seen, lost = 0, set(), True
    while lost:
        home, away, store = (tmp_path / f"{name}-{changes}" for name in ("home", "away", "store"))
        trial = home / "sweeps/s/trials/t"
        trial.mkdir(parents=True)
        (home / "sweeps/s" / SETTINGS).write_text("a: 1", encoding="utf-8")
        fragile = Fragile(str(store))
        sync = CheckpointSync(fragile, home / "sweeps/s")
        fragile.left, lost = changes, False
        try:
            live(trial, sync.upload)
        except Lost:
            lost = True
        there = away / "sweeps/s/trials/t"
        download(resources(away, str(store)), away / "sweeps/s", all_of)
        if there.exists():
            latest = latest_checkpoint(there)
            assert latest is not None, "with the sweep there is a checkpoint"
            assert "" in [find_damage(checkpoint) for checkpoint in there.glob("step_*")]
            step = int(latest.name.removeprefix("step_"))
            evaluated = {row["step"] for row in read_history(there)}
            assert evaluated >= set(range(1, step + 1)), "nobody evaluates them again"
            if (there / "end.json").exists():
                assert step == 3
            if (away / "sweeps/s/experiment_state-1.json").exists():
                assert (there / "end.json").exists()
            seen.add(step)
        changes += 1
    assert changes > 20
    assert seen == {1, 2, 3}
    assert {Path(n).parts[4] for n in FileStorage(str(store)).list_files("sweeps") if "step_" in n} == {"step_0000003"}


def test_a_training_is_downloaded_as_it_was_without_what_belongs_to_the_machine(address: str, tmp_path: Path) -> None:
    folder, report = begin(tmp_path / "home" / FIRST), tmp_path / "home/evaluations/first/report.html"
    of_folds = tmp_path / "home/evaluations/first-folds/report.html"
    assert not is_uploaded(resources(tmp_path / "away", address), tmp_path / "away" / FIRST)
    with synced(resources(tmp_path / "home", address), folder, all_of):
        evaluate(folder, 1)
        for name in ("stop", "workers", "ray/notes", ".step_2.partial/model"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        for file in (report, of_folds):
            file.parent.mkdir(parents=True)
            file.touch()
    away = tmp_path / "away" / FIRST
    with synced(resources(tmp_path / "away", address), away, all_of):
        assert find_damage(away / "step_0000001") == ""
        assert {path.name for path in away.iterdir()} == {"begun_with.json", "evaluations.jsonl", "step_0000001"}
        evaluate(away, 2)
    uploaded = FileStorage(address).list_files("")
    reports = {f"evaluations/{name}/report.html" for name in ("first", "first-folds")}
    assert reports | {f"{FIRST}/step_0000002/files.json"} <= uploaded.keys()
    download(resources(tmp_path / "home", address), folder, all_of)
    assert not (folder / "step_0000002").exists(), "what is here is not replaced"


def test_nothing_is_uploaded_twice_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    folder, store = begin(tmp_path / "home" / FIRST), Fragile(str(tmp_path / "store"))
    evaluate(folder, 1)
    sync = CheckpointSync(store, folder)
    sync.upload()
    store.left = 0
    sync.upload()
    delete_checkpoint(folder / "step_0000001")
    sync.upload()
    shutil.rmtree(folder)
    sync.upload()
    assert {f"{FIRST}/step_0000001/files.json", f"{FIRST}/begun_with.json"} <= store.list_files(FIRST).keys()


def test_a_state_of_ray_tune_is_uploaded_complete_and_in_its_newest_version(tmp_path: Path) -> None:
    folder, uploaded = tmp_path / "home/sweeps/step_1", tmp_path / "store/sweeps/step_1/experiment_state-1.json"
    (folder / "trials/t").mkdir(parents=True)
    state, store = folder / "experiment_state-1.json", Fragile(str(tmp_path / "store"))
    sync = CheckpointSync(store, folder)
    state.write_text('{"a": 1', encoding="utf-8")
    sync.upload()
    assert store.list_files("sweeps") == {}
    state.write_text('{"a": 1}', encoding="utf-8")
    (folder / "trials/t/point.json").write_text("{}", encoding="utf-8")
    store.after = lambda name: state.write_text('{"a": 20}', encoding="utf-8")  # written during an upload
    sync.upload()
    assert uploaded.read_text(encoding="utf-8") == '{"a": 1}'
    sync.upload()
    assert uploaded.read_text(encoding="utf-8") == '{"a": 20}'


def test_an_object_store_that_fails_for_a_while_is_noted_and_has_everything_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []  # capsys may lose what a thread prints while it is read
    monkeypatch.setattr(checkpoint_sync, "note", notes.append)
    monkeypatch.setattr(checkpoint_sync, "INTERVAL", 0.01)
    place, disk, file = tmp_path / "place", tmp_path / "disk", tmp_path / "file"
    disk.mkdir()
    file.touch()  # nothing can be written below a file
    place.symlink_to(disk)
    folder = begin(tmp_path / "home" / FIRST)

    def lead_to(target: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(target)
        link.replace(place)  # at once: an upload would make a folder where there is nothing

    with synced(resources(tmp_path / "home", str(place)), folder, all_of):
        lead_to(file)
        evaluate(folder, 1)
        while not notes:
            time.sleep(0.01)
        lead_to(disk)
    assert len(notes) == 1
    assert "there is no upload for now" in notes[0]
    assert find_damage(disk / FIRST / "step_0000001") == ""


@pytest.mark.parametrize("address", ["file", "s3://bucket/runs?region=x&scheme=http&endpoint_override=127.0.0.1:9"])
def test_a_store_that_cannot_be_reached_is_one_line(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^resources\.upload=.*(file|:9): .*; check the address and its credentials$"):
        CheckpointSync(FileStorage(address, "resources.upload"), tmp_path / "home" / FIRST)


def test_a_folder_that_is_something_else_is_not_replaced(tmp_path: Path) -> None:
    address, folder = str(tmp_path / "store"), tmp_path / "home" / FIRST
    CheckpointSync(FileStorage(address), begin(tmp_path / "other" / FIRST)).upload()
    (folder / "something").mkdir(parents=True)
    with pytest.raises(UserError, match=r"first exists and is not trainings/first; delete it or move it away$"):
        download(resources(tmp_path / "home", address), folder, all_of)
