"""Upload trainings and sweeps to an object store while they run, and download one that this machine does not have.

Only one machine at a time may run a training or sweep. This is not checked.
"""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from umbrella.base import ProgressBar, UserError, note
from umbrella.file_storage import FileStorage
from umbrella.fileio import link_or_copy
from umbrella.paths import CHECKPOINT, END, RAY, SIZES, STOP, SWEEPS, WORKERS, evaluation_folder, marker_of, storage_of
from umbrella.training.checkpoint_files import find_damage
from umbrella.training.settings import ResourceSettings

SETTING = "resources.upload"
INTERVAL = 10.0
"""Seconds between two uploads of what is new."""
LOCAL = {STOP, WORKERS, RAY}
"""Files and folders that are not uploaded."""
Stamp = tuple[int, int]
"""Size of a file in bytes, and its modification time in ns."""


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
    with CheckpointSync(FileStorage(resources.upload, SETTING), folder):
        yield


def is_uploaded(resources: ResourceSettings, folder: Path) -> bool:
    """Whether the object store has a training or sweep of this name.

    Raises:
        UserError: the object store cannot be read.
    """
    if not resources.upload:
        return False
    with _as_user_error():
        return marker_of(folder).name in FileStorage(resources.upload, SETTING).names(_run_name(folder))


def download(resources: ResourceSettings, folder: Path, progress: ProgressBar) -> None:
    """Download a training or sweep if this machine does not have it and the object store does.

    A checkpoint without its completion marker is left out. The folder is renamed when its download is complete.

    Raises:
        UserError: the object store cannot be read; the folder exists and holds something else.
    """
    if marker_of(folder).is_file() or not is_uploaded(resources, folder):
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not {_run_name(folder)}; delete it or move it away")
    store, target = FileStorage(resources.upload, SETTING), folder.with_name(f".{folder.name}.download")
    shutil.rmtree(target, ignore_errors=True)
    with _as_user_error():
        sizes = store.sizes(_run_name(folder))
        names = [n for n in sizes if not _checkpoint_folder(n) or f"{_checkpoint_folder(n)}/{SIZES}" in sizes]
        for name in progress(names, f"downloading {_run_name(folder)}"):
            file = target / os.path.relpath(name, _run_name(folder))
            file.parent.mkdir(parents=True, exist_ok=True)
            if not store.fetch(name, file, partial(_has_size, sizes[name])):
                raise OSError(f"{store}: {name} changed while it was downloaded")
    with suppress(OSError):
        folder.rmdir()
    target.rename(folder)


class CheckpointSync:
    """Uploads the folder of a training or sweep from a thread, every ``INTERVAL`` seconds and at the end.

    A machine may fail at any time, so the object store is always consistent: a file that refers to checkpoints, such as
    the end of a trial, is read before the checkpoints are listed and uploaded after them, and the completion marker of
    a checkpoint is uploaded after its other files.

    Args:
        store: names in it are paths below the storage folder.
        folder: of the training or sweep; its evaluation is uploaded with it.
    """

    def __init__(self, store: FileStorage, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.folders = [folder, evaluation_folder(storage_of(folder), folder.name)]
        self.storage, self.marker = storage_of(folder), marker_of(folder).name
        self._stop, self._error = threading.Event(), ""
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        with _as_user_error():
            self._names = {name for each in self.folders for name in store.sizes(_run_name(each))}
            self.store.put(f"{_run_name(folder)}/.probe", b"")
            self.store.delete(f"{_run_name(folder)}/.probe")
        self._uploaded: dict[str, Stamp] = {}

    def __enter__(self) -> "CheckpointSync":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error:
            note(f"{self._error}; the upload of {_run_name(self.folder)} is not complete")

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._upload_or_note()
        self._upload_or_note()

    def _upload_or_note(self) -> None:
        try:
            self.upload()
            self._error = ""
        except OSError as error:  # a failed upload must not end the training
            message = str(error.strerror or error)
            if not self._error:
                note(f"{message}; {_run_name(self.folder)} is not uploaded for now")
            self._error = message

    def upload(self) -> None:
        """Upload new files. Delete checkpoints that were deleted here, once a newer one is uploaded.

        Raises:
            OSError: the object store cannot be written.
        """
        references: dict[Path, tuple[Stamp, bytes]] = {}
        for file in filter(self._is_reference, self._files()):
            stamp = _stamp(file)  # before the read, so that the next upload sees later changes
            if self._uploaded.get(str(file)) != stamp and _is_complete(file, content := file.read_bytes()):
                references[file] = stamp, content
        checkpoints = sorted({file.parent for file in self._files() if file.name == SIZES})
        for file in self._files():
            if not self._is_reference(file) and not _checkpoint_folder(str(file)):
                self._put(file)
        uploaded = [checkpoint for checkpoint in checkpoints if self._put_checkpoint(checkpoint)]
        for file in sorted(references, key=lambda file: (file.name == self.marker, file.name != END)):
            stamp, content = references[file]
            if file.exists():  # it may have been deleted meanwhile
                self._send(self._store_name(file), content)
                self._uploaded[str(file)] = stamp
        newest = {checkpoint.parent: checkpoint for checkpoint in uploaded}
        for name in sorted(self._names, key=lambda name: not name.endswith(f"/{SIZES}")):
            folder = _checkpoint_folder(name)
            checkpoint = self.storage / folder
            if folder and not checkpoint.exists() and checkpoint < newest.get(checkpoint.parent, Path()):
                self.store.delete(name)
                self._names.discard(name)

    def _files(self) -> Iterator[Path]:
        for top in self.folders:
            for folder, folders, names in os.walk(top):
                folders[:] = [name for name in folders if not name.startswith(".") and name not in LOCAL]
                visible = (name for name in names if not name.startswith(".") and name not in LOCAL)
                yield from (Path(folder, name) for name in sorted(visible))

    def _is_reference(self, file: Path) -> bool:
        """Whether a file refers to others: the end of a trial, Ray Tune's state, the marker of a training or sweep."""
        of_tune = self.folder.parent.name == SWEEPS and file.parent == self.folder
        return file.name in (END, self.marker) or of_tune

    def _put(self, file: Path) -> None:
        with suppress(FileNotFoundError):  # deleted meanwhile
            stamp = _stamp(file)
            if self._uploaded.get(str(file)) != stamp:
                self._send(self._store_name(file), file.read_bytes())
                self._uploaded[str(file)] = stamp

    def _put_checkpoint(self, checkpoint: Path) -> bool:
        """Upload a checkpoint. Return whether all of it is in the store."""
        if self._store_name(checkpoint / SIZES) in self._names:
            return True
        # Hard links keep its files if it is deleted before it is uploaded.
        linked = checkpoint.with_name(f".{checkpoint.name}.upload")
        try:
            shutil.rmtree(linked, ignore_errors=True)
            shutil.copytree(checkpoint, linked, copy_function=link_or_copy)
            if find_damage(linked):
                return False
            for file in sorted(linked.rglob("*"), key=lambda file: file.name == SIZES):
                if file.is_file():
                    self._send(self._store_name(checkpoint / file.relative_to(linked)), file)
        except (FileNotFoundError, shutil.Error):
            return False
        finally:
            shutil.rmtree(linked, ignore_errors=True)
        return True

    def _send(self, name: str, content: Path | bytes) -> None:
        self.store.put(name, content)
        self._names.add(name)

    def _store_name(self, file: Path) -> str:
        return file.relative_to(self.storage).as_posix()


def _run_name(folder: Path) -> str:
    """Return the name of a training or sweep in the object store, such as "trainings/first"."""
    return f"{folder.parent.name}/{folder.name}"


def _stamp(file: Path) -> Stamp:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _checkpoint_folder(name: str) -> str:
    """Return the checkpoint folder of a file; "" if it is in none."""
    parts = Path(name).parts
    inside = next((i for i, part in enumerate(parts[:-1]) if part.startswith(CHECKPOINT)), None)
    return "" if inside is None else str(Path(*parts[: inside + 1]))


def _is_complete(file: Path, content: bytes) -> bool:
    """Whether a file that Ray Tune writes in place, JSON or a pickle, is complete."""
    if content[:1] == b"\x80":  # a pickle, with any name
        return content[-1:] == b"."
    if file.suffix == ".json":
        try:
            json.loads(content)
        except ValueError:
            return False
    return True


def _has_size(size: int, file: Path) -> bool:
    return file.stat().st_size == size


@contextmanager
def _as_user_error() -> Iterator[None]:
    """Raise an error of the object store as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.strerror or error}; check the address and its credentials") from None
