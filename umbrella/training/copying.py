"""A training's or a sweep's folder, copied to a store so that what lies there can be gone on from at every moment.

What tells of other files has to be older than they are, or the same: a machine may be lost between any two files. So
each round looks in one order and copies in another:

    looks: ends of trials, and Ray's notes · which checkpoints are whole · run.json · outboxes · everything else
    copies: everything else · outboxes · checkpoints, what makes each whole last · ends, Ray's notes, the begun file

A trial's note of whose checkpoint it took goes with its checkpoints: where it is, they are those that it tells of.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from umbrella.shared_store import SharedStore
from umbrella.storage import link_or_copy
from umbrella.tracking.outbox import LOCKS, OUTBOX, RUN
from umbrella.training.filenames import END, LIVE
from umbrella.training.progress import FILES, what_is_wrong

Stamp = tuple[int, int]
"""Bytes of a file, and when it was written, in ns."""
STAYS = {*LOCKS, LIVE}
"""Files that say nothing elsewhere, or later."""


class Copy:
    """Copies folders of a storage into a store, round by round; a name there is a path below the storage.

    Args:
        folder: the training's or sweep's, as in "trainings/first".
        begun: the file of it without which it is none.
        also: more folders, such as of its evaluation.
        while_copying: called before each change, and now and then while a large file is copied. What it raises ends the
            round.
    """

    def __init__(
        self,
        store: SharedStore,
        storage: Path,
        folder: str,
        begun: str,
        also: Collection[str] = (),
        while_copying: Callable[[], None] = lambda: None,
    ) -> None:
        self.store, self.storage, self.folder = store, storage, folder
        self.begun, self.parts, self._while_copying = f"{folder}/{begun}", (folder, *also), while_copying
        self.copied: dict[str, Stamp] = {}
        """Files that lie there as they were when they had this stamp."""
        self.there: set[str] = set()
        """Files there that go when they are gone here: not an evaluation that another machine made."""
        self.bytes = 0
        """Copied so far: tells whether it goes on."""

    def look(self, copied: Mapping[str, Stamp]) -> None:
        """Find out what lies there. ``copied``: what is said to; of another size it is not that."""
        sizes = {name: size for part in self.parts for name, size in self.store.sizes(part).items()}
        for name in [name for name in sizes if name.endswith(".partial")]:  # of a machine that was lost
            self.store.delete(name)
        self.copied = {name: stamp for name, stamp in copied.items() if sizes.get(name) == stamp[0]}
        ours = [name for name in sizes if name.startswith(f"{self.folder}/") or name in self.copied]
        self.there = set(filter(travels, ours))

    def left(self) -> tuple[int, int]:
        """How many files are not there as they are here, and their bytes."""
        stamps = [stamp for name, stamp in self._files().items() if self.copied.get(name) != stamp]
        return len(stamps), sum(size for size, _ in stamps)

    def round(self) -> None:
        """Copy what is new or has changed, and delete there what is gone here.

        Raises:
            OSError: the store, or this machine's disk, does not do it. What is there can be gone on from.
        """
        files = self._files()
        notes = self._taken(name for name in files if self._is_note(name))
        checkpoints = by_checkpoint(files)
        whole = {c for c, own in checkpoints.items() if f"{c}/{FILES}" in own and own.items() <= self.copied.items()}
        new = [c for c in sorted(checkpoints.keys() - whole) if not what_is_wrong(self.storage / c)]
        mail = self._taken(name for name in files if os.path.basename(name) == RUN)
        mail |= self._taken({f"{os.path.dirname(name)}/{OUTBOX}" for name in files if _is_mail(name)})
        files = self._files()
        for name, stamp in files.items():
            if not (self._is_note(name) or _is_mail(name) or checkpoint_of(name)):
                self._put(name, stamp)
        self._put_all(mail, lambda name: os.path.basename(name) == RUN)
        whole |= {checkpoint for checkpoint in new if self._put_checkpoint(checkpoint)}
        self._put_all(notes, lambda name: (name == self.begun, os.path.basename(name) != END))
        if (self.storage / self.begun).is_file():
            self._remove(files, whole)

    def _files(self) -> dict[str, Stamp]:
        found = {}
        for part in self.parts:
            for folder, folders, names in os.walk(self.storage / part):
                folders[:] = [name for name in folders if not name.startswith(".")]
                below = os.path.relpath(folder, self.storage)
                for name in filter(travels, names):
                    if stamp := stamp_of(Path(folder, name)):
                        found[f"{below}/{name}"] = stamp
        return found

    def _is_note(self, name: str) -> bool:
        """Whether a file tells of others: that a trial has ended, what Ray Tune knows, that there is a training."""
        place, _, last = name.removeprefix(f"{self.folder}/").rpartition("/")
        of_ray = self.folder.startswith("sweeps/") and place.split("/")[0] not in ("trials", "tracking")
        return name == self.begun or last == END or (of_ray and name.startswith(f"{self.folder}/"))

    def _taken(self, names: Iterable[str]) -> dict[str, tuple[Stamp, bytes]]:
        """What is in files now, of those that are not there yet; one that is half written waits for the next round."""
        taken = {}
        for name in names:
            path = self.storage / name
            if (stamp := stamp_of(path)) and self.copied.get(name) != stamp:
                try:
                    content = path.read_bytes()
                except FileNotFoundError:
                    continue
                if _is_whole(name, content):
                    taken[name] = stamp, content
        return taken

    def _put_all(self, taken: Mapping[str, tuple[Stamp, bytes]], order: Callable[[str], Any]) -> None:
        for name in sorted(taken, key=order):
            self._put(name, *taken[name])

    def _put(self, name: str, stamp: Stamp, content: Path | bytes | None = None) -> None:
        if self.copied.get(name) == stamp:
            return
        self._while_copying()
        path = self.storage / name
        try:
            self.store.put(name, path if content is None else content, self._count)
        except OSError:
            if content is None and not path.exists():  # it went meanwhile
                return
            raise
        self.copied[name] = stamp
        self.there.add(name)

    def _count(self, size: int) -> None:
        self.bytes += size
        self._while_copying()

    def _put_checkpoint(self, checkpoint: str) -> bool:
        """Copy a checkpoint; returns whether it is there now, whole.

        From second names: one that is pruned meanwhile is copied to its end. Where copying takes longer than the next
        checkpoint does, there would never be a whole one.
        """
        mark, folder = f"{checkpoint}/{FILES}", self.storage / checkpoint
        held = folder.with_name(f".{folder.name}.copied")
        try:
            shutil.rmtree(held, ignore_errors=True)
            shutil.copytree(folder, held, copy_function=self._hold)
            if what_is_wrong(held):
                return False
            if mark in self.there:
                self._delete(mark)
            names = [str(file.relative_to(held)) for file in sorted(held.rglob("*")) if file.is_file()]
            for name in sorted(names, key=FILES.__eq__):
                stamp = stamp_of(held / name)
                if stamp is None:
                    return False
                self._put(f"{checkpoint}/{name}", stamp, held / name)
        except (FileNotFoundError, shutil.Error):
            if not what_is_wrong(held):
                raise
            return False  # it was pruned before it had its second names; or a worker that starts took these for rests
        finally:
            shutil.rmtree(held, ignore_errors=True)
        return True

    def _hold(self, source: str, target: str) -> None:
        link_or_copy(source, target)
        self._while_copying()  # copies take long

    def _remove(self, files: Collection[str], whole: Collection[str]) -> None:
        """Delete there what is gone here. A training's newest checkpoint stays until a newer one is there, whole."""
        newest = {os.path.dirname(checkpoint): checkpoint for checkpoint in sorted(whole)}
        gone = [name for name in self.there - set(files) if not (self.storage / name).exists()]
        for name in sorted(gone, key=lambda name: not name.endswith(f"/{FILES}")):
            checkpoint = checkpoint_of(name)
            replaced = checkpoint < newest.get(os.path.dirname(checkpoint), "")
            if checkpoint and (not replaced or (self.storage / checkpoint).exists()):
                continue
            self._delete(name)

    def _delete(self, name: str) -> None:
        self._while_copying()
        self.copied.pop(name, None)
        self.store.delete(name)
        self.there.discard(name)


def _is_whole(name: str, content: bytes) -> bool:
    """Whether a file that is not renamed into its place, as Ray's are not, has been written to its end."""
    if content[:1] == b"\x80":  # a pickle, whatever its name
        return content[-1:] == b"."
    if not name.endswith(".json") or os.path.basename(name) == "result.json":  # that one has many lines
        return True
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _is_mail(name: str) -> bool:
    return os.path.basename(name) in (OUTBOX, RUN)


def checkpoint_of(name: str) -> str:
    """The checkpoint that a file belongs to, as in "trainings/first/step_0000005"; empty if none."""
    found = re.match(r"[^/]+/[^/]+/(?:.+/)?step_\d+(?=/)", name)
    return found[0] if found else ""


def by_checkpoint(files: Mapping[str, Stamp]) -> dict[str, dict[str, Stamp]]:
    """The files of each checkpoint."""
    found: dict[str, dict[str, Stamp]] = {}
    for name, stamp in files.items():
        if checkpoint := checkpoint_of(name):
            found.setdefault(checkpoint, {})[name] = stamp
    return found


def travels(name: str) -> bool:
    """Whether a file is worth copying, by its path."""
    last = os.path.basename(name)
    return not last.startswith(".") and not last.endswith(".partial") and last not in STAYS


def stamp_of(path: Path) -> Stamp | None:
    """A file's stamp; None where it is gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _has(size: int, file: Path) -> bool:
    return file.stat().st_size == size


def bring(store: SharedStore, folder: str, begun: str, to: Path, progress: Callable) -> dict[str, Stamp]:
    """Fetch a folder that the store has, into another one; a checkpoint that is not whole there is left out.

    Args:
        begun: its file that comes last.

    Returns the files by their names in the store, with their stamps here.

    Raises:
        OSError: it cannot be fetched whole.
    """
    sizes = {name: size for name, size in store.sizes(folder).items() if travels(name)}
    stamps = {}
    whole = [n for n in sizes if not checkpoint_of(n) or f"{checkpoint_of(n)}/{FILES}" in sizes]
    for name in progress(sorted(whole, key=f"{folder}/{begun}".__eq__), f"fetching {folder}"):
        file = to / os.path.relpath(name, folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not store.fetch(name, file, partial(_has, sizes[name])):
            raise OSError(f"{store}: {name} was changed while it was fetched; does another machine write there?")
        stamps[name] = file.stat().st_size, file.stat().st_mtime_ns
    return stamps
