"""Upload trainings and sweeps to an object store while they run, and download one that this machine does not have.

Only one machine at a time may run a training or sweep. This is not checked.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from umbrella.base import ProgressBar, UserError, note
from umbrella.file_storage import FileStorage
from umbrella.fileio import link_or_copy, run_lock
from umbrella.paths import (
    CHECKPOINT,
    END,
    EVALUATIONS,
    FOLDS,
    RAY,
    SETTINGS,
    SIZES,
    STOP,
    SWEEPS,
    WORKERS,
    marker_of,
    storage_of,
)
from umbrella.training.checkpoint_files import find_damage
from umbrella.training.settings import ResourceSettings

SETTING = "resources.upload"
INTERVAL = 10.0
"""Seconds between two uploads of what is new."""
LOCAL = {STOP, WORKERS, RAY}
"""Files and folders that are not uploaded."""


@contextmanager
def synced(resources: ResourceSettings, folder: Path, progress: ProgressBar) -> Iterator[None]:
    """Download a training or sweep that this machine does not have, and upload it while the block runs.

    Args:
        folder: of the training or sweep; its evaluation is uploaded with it.

    Raises:
        UserError: the object store cannot be read or written.
    """
    if not resources.upload:
        yield
        return
    download(resources, folder, progress)
    sync, stop = CheckpointSync(FileStorage(resources.upload, SETTING), folder), threading.Event()
    thread = threading.Thread(target=sync.run, args=[stop], name="upload", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def is_uploaded(resources: ResourceSettings, folder: Path) -> bool:
    """Whether the object store has a training or sweep of this name.

    Raises:
        UserError: the object store cannot be read.
    """
    return bool(resources.upload and _list_run(FileStorage(resources.upload, SETTING), folder))


def download(resources: ResourceSettings, folder: Path, progress: ProgressBar) -> None:
    """Download a training or sweep if this machine does not have it and the object store does.

    A checkpoint without its completion marker is left out. The folder is renamed when its download is complete.

    Raises:
        UserError: the object store cannot be read; the folder exists and holds something else.
    """
    run, store = _run_name(folder), FileStorage(resources.upload, SETTING)
    if marker_of(folder).is_file() or not (found := _list_run(store, folder)):
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not {run}; delete it or move it away")
    names = [name for name in found if not _checkpoint_of(name) or f"{_checkpoint_of(name)}/{SIZES}" in found]
    target = folder.with_name(f".{folder.name}.download")
    shutil.rmtree(target, ignore_errors=True)
    with _as_user_error():
        for name in progress(names, f"downloading {run}"):
            file = target / os.path.relpath(name, run)
            file.parent.mkdir(parents=True, exist_ok=True)
            store.download(name, file)
    with suppress(OSError):
        folder.rmdir()
    target.rename(folder)


def find_run(resources: ResourceSettings, kind: str, name: str, progress: ProgressBar) -> Path:
    """Return the folder of a training or sweep that is resumed, and download it if this machine does not have it.

    Args:
        kind: TRAININGS or SWEEPS.
        name: of the run, or "last" for the one of this storage that was started last.

    Raises:
        UserError: there is no such run, or the object store cannot be read.
    """
    runs = Path(resources.storage) / kind
    started = {file.parent.name: file.stat().st_mtime for file in runs.glob(f"*/{SETTINGS}")}
    folder = runs / (max(started, key=started.__getitem__, default="") if name == "last" else name)
    if not folder.exists() and resources.upload:
        with run_lock(folder):
            download(resources, folder, progress)
    if folder == runs or not (folder / SETTINGS).is_file():
        raise UserError(f"--resume {name}: {runs} has no such run; existing: {', '.join(sorted(started)) or 'none'}")
    return folder


def _list_run(store: FileStorage, folder: Path) -> set[str]:
    """Return the names of the files of a training or sweep; none if its marker is missing."""
    with _as_user_error():
        found = set(store.list_files(_run_name(folder)))
    return found if f"{_run_name(folder)}/{marker_of(folder).name}" in found else set()


class CheckpointSync:
    """Uploads the folder of a training or sweep.

    A machine may fail at any time, so the object store is always consistent: a file that refers to checkpoints, such as
    the end of a trial, is read before the checkpoints are listed and uploaded after them, and the completion marker of
    a checkpoint is uploaded after its other files.

    Args:
        store: names in it are paths below the storage folder.
        folder: of the training or sweep; its evaluation is uploaded with it.
    """

    def __init__(self, store: FileStorage, folder: Path) -> None:
        self.store, self.folder, self.storage = store, folder, storage_of(folder)
        with _as_user_error():
            names = [name for name in store.list_files(_run_name(folder)) if _checkpoint_of(name)]
            store.upload(f"{_run_name(folder)}/.probe", b"")
            store.delete(f"{_run_name(folder)}/.probe")
        self._checkpoint_files = set(names)
        """Names of the files of checkpoints in the store."""
        self._uploaded: dict[Path, tuple[int, int]] = {}
        """Size and modification time in ns of each other file when it was read."""

    def run(self, stop: threading.Event) -> None:
        """Upload every ``INTERVAL`` seconds and after the stop. Notes errors: they must not end the training."""
        failed = last = False
        while not last:
            last = stop.wait(INTERVAL)
            try:
                self.upload()
                failed = False
            except OSError as error:
                if last or not failed:
                    when = "the upload is not complete" if last else "there is no upload for now"
                    note(f"{_run_name(self.folder)}: {when}: {error.strerror or error}")
                failed = True

    def upload(self) -> None:
        """Upload new files. Delete checkpoints that were deleted here, once a newer one is uploaded.

        Raises:
            OSError: the object store cannot be written.
        """
        references = list(self._changed(self._is_reference))
        checkpoints = sorted({file.parent for file in self._files() if file.name == SIZES})
        for change in self._changed(lambda file: not self._is_reference(file) and not _checkpoint_of(self._name(file))):
            self._upload(*change)
        newest = {checkpoint.parent: checkpoint for checkpoint in checkpoints if self._upload_checkpoint(checkpoint)}
        marker = marker_of(self.folder).name
        for change in sorted(references, key=lambda change: (change[0].name == marker, change[0].name != END)):
            if change[0].exists():  # it may have been deleted meanwhile
                self._upload(*change)
        for name in sorted(self._checkpoint_files, key=lambda name: not name.endswith(f"/{SIZES}")):
            checkpoint = self.storage / _checkpoint_of(name)
            newer = newest.get(checkpoint.parent)
            if not checkpoint.exists() and newer and checkpoint < newer:
                self.store.delete(name)
                self._checkpoint_files.discard(name)

    def _name(self, file: Path) -> str:
        return file.relative_to(self.storage).as_posix()

    def _files(self) -> Iterator[Path]:
        evaluation = self.storage / EVALUATIONS / self.folder.name
        for top in (self.folder, evaluation, evaluation.with_name(f"{evaluation.name}{FOLDS}")):
            for folder, folders, names in os.walk(top):
                folders[:] = [name for name in folders if not name.startswith(".") and name not in LOCAL]
                yield from (Path(folder, n) for n in sorted(names) if not n.startswith(".") and n not in LOCAL)

    def _is_reference(self, file: Path) -> bool:
        """Whether a file refers to others: the end of a trial, Ray Tune's state, the marker of a training or sweep."""
        of_tune = self.folder.parent.name == SWEEPS and file.parent == self.folder
        return file.name == END or file == marker_of(self.folder) or of_tune

    def _changed(self, chosen: Callable[[Path], bool]) -> Iterator[tuple[Path, tuple[int, int], bytes]]:
        """Read the chosen files that are new or have changed. Yield file, stamp and content."""
        for file in filter(chosen, self._files()):
            with suppress(FileNotFoundError):  # deleted meanwhile
                found = file.stat()  # before the read, so that the next upload sees later changes
                stamp = found.st_size, found.st_mtime_ns
                if self._uploaded.get(file) != stamp and _is_complete(file, content := file.read_bytes()):
                    yield file, stamp, content

    def _upload(self, file: Path, stamp: tuple[int, int], content: bytes) -> None:
        self.store.upload(self._name(file), content)
        self._uploaded[file] = stamp

    def _upload_checkpoint(self, checkpoint: Path) -> bool:
        """Upload a checkpoint. Return whether all of it is in the store."""
        name = self._name(checkpoint)
        if f"{name}/{SIZES}" in self._checkpoint_files:
            return True
        # Hard links keep its files if it is deleted before it is uploaded.
        linked = checkpoint.with_name(f".{checkpoint.name}.upload")
        try:
            shutil.rmtree(linked, ignore_errors=True)
            shutil.copytree(checkpoint, linked, copy_function=link_or_copy)
            if find_damage(linked):
                return False
            for file in sorted(filter(Path.is_file, linked.rglob("*")), key=lambda file: file.name == SIZES):
                file_name = f"{name}/{file.relative_to(linked).as_posix()}"
                self.store.upload(file_name, file)
                self._checkpoint_files.add(file_name)
        except (FileNotFoundError, shutil.Error):
            return False
        finally:
            shutil.rmtree(linked, ignore_errors=True)
        return True


def _run_name(folder: Path) -> str:
    """Return the name of a training or sweep in the object store, such as "trainings/first"."""
    return f"{folder.parent.name}/{folder.name}"


def _checkpoint_of(name: str) -> str:
    """Return the checkpoint folder of a file of a training, trial or sweep; "" if it is in none."""
    inside = list(Path(name).parents)[:-3]  # a sweep may be named like a checkpoint
    folders = [parent for parent in inside if parent.name.startswith(CHECKPOINT)]
    return str(folders[-1]) if folders else ""


def _is_complete(file: Path, content: bytes) -> bool:
    """Whether a file is complete. Ray Tune writes its state in place, as JSON; its other files it renames."""
    if file.suffix == ".json":
        try:
            json.loads(content)
        except ValueError:
            return False
    return True


@contextmanager
def _as_user_error() -> Iterator[None]:
    """Raise an error of the object store as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.strerror or error}; check the address and its credentials") from None
