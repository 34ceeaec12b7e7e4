"""Trainings and sweeps in ``resources.mirror``: copied there while they run, fetched where this machine lacks them."""

import json
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from umbrella.base import UserError
from umbrella.data.loading import Progress, counted
from umbrella.shared_store import SharedStore, is_address
from umbrella.storage import put_text, storage_fault
from umbrella.training.copying import Copy, Stamp, bring
from umbrella.training.filenames import BEGUN
from umbrella.training.ownership import NOTE, Ownership, note
from umbrella.training.settings import ResourceSettings

SETTING = "resources.mirror"
EVERY = 10.0
"""Seconds between two looks for what is new."""
LAST_WAIT = 20.0
"""Seconds that the end of a script waits for a mirror that takes nothing."""
TRIES = 3
"""How often the end tries again at least where the mirror takes something, and then fails."""
SAY = 10.0
"""Seconds between two lines about how much the end still waits for."""


@contextmanager
def mirrored(
    resources: ResourceSettings, folder: Path, progress: Progress, also: Collection[Path] = ()
) -> Iterator[None]:
    """While in here, a training or sweep is copied to the mirror, if there is one; with all that is new at the end.

    Args:
        folder: of it. Where it is not here and the mirror has it, it is fetched first.
        also: more folders that are copied with it.

    Raises:
        UserError: as ``Mirror.open``.
    """
    if not resources.mirror:
        yield
        return
    with Mirror(resources, folder, also).open(progress):
        yield


class Mirror:
    """One training's or sweep's place in the mirror, for one script."""

    def __init__(self, resources: ResourceSettings, folder: Path, also: Collection[Path] = ()) -> None:
        self.store = SharedStore(resources.mirror, SETTING)
        self.folder, self.storage = folder, folder.parent.parent
        self.name, self.begun = f"{folder.parent.name}/{folder.name}", BEGUN[folder.parent.name]
        others = [str(path.relative_to(self.storage)) for path in also]
        self.copy = Copy(self.store, self.storage, self.name, self.begun, others, self._live)
        self.ownership = Ownership(self.store, self.name)
        self._ending, self._given_up = threading.Event(), threading.Event()
        self._failed, self._saved = "", ""
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    @property
    def here(self) -> bool:
        """Whether this machine has the training or sweep."""
        return (self.folder / self.begun).is_file()

    @property
    def there(self) -> bool:
        """Whether the mirror has it."""
        return self.begun in self.store.names(self.name)

    def open(self, progress: Progress) -> "Mirror":
        """Look whether the mirror can be written to, and fetch what this machine lacks.

        Raises:
            UserError: it cannot; another machine has gone on with this, or is at it.
        """
        if not is_address(self.store.address) and Path(self.store.address).resolve() == self.storage.resolve():
            raise UserError(f"{self.store}: is resources.storage itself; name another place, or none")
        with _refusing(self.store):
            probe = f".{uuid4().hex}.probe"
            self.store.put(probe, b"may this be written?")
            self.store.delete(probe)
            owner, (sessions, copied) = self.ownership.owner(), self._known()
            if self.here and owner and owner["session"] not in sessions:
                raise UserError(
                    f"{self.store}: {self.name} went on elsewhere (on {owner['host']}) since it was here; to go on with"
                    f" that one, delete {self.folder} or move it away; to keep this one, take another mirror"
                )
            if not self.here:
                self.ownership.wait_for_silence(owner)
                sessions = [owner["session"]] if owner else []
            self.ownership.sessions = sessions
            if not self.here and self.there:
                copied = self._fetch(progress, owner)
            self.copy.look(copied)
        return self

    def _fetch(self, progress: Progress, owner: dict[str, Any]) -> dict[str, Stamp]:
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} is in the way of what {self.store} has; delete it or move it away")
        if not owner:
            raise UserError(f"{self.store}: {self.name} is there, but no {NOTE} of who copied it; copy it here by hand")
        first = self.folder.with_name(f".{self.folder.name}.fetched")
        shutil.rmtree(first, ignore_errors=True)
        copied = bring(self.store, self.name, self.begun, first, progress)
        begun = first / self.begun
        os.utime(begun, (owner["begun"], owner["begun"]))
        copied[f"{self.name}/{self.begun}"] = begun.stat().st_size, begun.stat().st_mtime_ns
        self._remember(copied, first)
        first.rename(self.folder)
        return copied

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        """Copy what is new, for as long as that goes on."""
        self._ending.set()
        began = moved = said = time.monotonic()
        bytes_then = self.copy.bytes
        while self._thread.is_alive():
            self._thread.join(0.1)
            now = time.monotonic()
            if self.copy.bytes != bytes_then:
                bytes_then, moved = self.copy.bytes, now
            if now - moved > LAST_WAIT:
                self._given_up.set()
                break
            if now - said > SAY:
                said = now
                print(f"{now - began:.0f} s: copying to {self.store}; left: {self._left()}", flush=True)
        if not self.ownership.lost and (self._failed or self._thread.is_alive()):
            why = self._failed or f"{self.store}: does not answer"
            note(f"{self._left()} of {self.name} not copied: {why}; {self._again} copies them")

    @property
    def _again(self) -> str:
        if self.folder.parent.name == "sweeps":
            return f"experiments/tune.py --resume {self.folder.name}"
        return f"the same command, with name={self.folder.name},"

    def _left(self) -> str:
        from rich.filesize import decimal

        files, size = self.copy.left()
        return f"{counted(files, 'file')} ({decimal(size)})"

    def _run(self) -> None:
        while not self.ownership.lost:
            self._round()  # the first one at once: others see that this name is taken
            if self._ending.wait(EVERY):
                break
        failed, first = 0, 0.0
        while not (self.ownership.lost or self._round(last=True) or self._given_up.wait(1.0)):
            failed, first = failed + 1, first or time.monotonic()
            if failed >= TRIES and time.monotonic() - first > LAST_WAIT:
                break

    def _round(self, last: bool = False) -> bool:
        """Copy once; returns whether that worked. What does not is said once, and once when it works again."""
        try:
            self._claim()
            if self.ownership.lost:
                return False
            if not self.here:
                if last and not self.there:  # nothing was begun
                    self.ownership.leave()
                return True
            try:
                self.copy.round()
            finally:
                self._remember(self.copy.copied)
            if last:
                self._sign(writing=False)
        except Exception as error:  # whatever it is: no training ends for want of its copy
            if self.ownership.lost:
                return False
            if not self._failed:
                note(f"{_words(error, self.store)}; {self.name} is not copied for now, and tried again")
            self._failed = _words(error, self.store)
            return False
        if self._failed:
            note(f"{self.store}: works again, and has all of {self.name}")
        self._failed = ""
        return True

    def _claim(self) -> None:
        """Let others see that this script writes here, unless another one does."""
        if self.ownership.may():
            if self.here:
                self._remember(self.copy.copied)
            self._sign(writing=True)

    def _sign(self, writing: bool) -> None:
        begun = (self.folder / self.begun).stat().st_mtime if self.here else time.time()
        self.ownership.sign(begun, writing)

    def _live(self) -> None:
        """Give a sign now and then in a long round; raises OSError where another script has taken over meanwhile."""
        if not self.ownership.lost and time.monotonic() - self.ownership.signed > EVERY:
            self._claim()
        if self.ownership.lost:
            raise OSError(self.ownership.lost)

    def _known(self) -> tuple[list[str], dict[str, Stamp]]:
        """What is known here: the sessions that have written from this folder, and what lies there."""
        try:
            known = json.loads((self.folder / NOTE).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return [], {}
        return known["sessions"], {name: tuple(stamp) for name, stamp in known["copied"].items()}

    def _remember(self, copied: dict[str, Stamp], folder: Path | None = None) -> None:
        text = json.dumps({"sessions": self.ownership.sessions, "copied": copied})
        if text != self._saved:
            put_text((folder or self.folder) / NOTE, text)
            self._saved = text


def sweeps_in_mirror(resources: ResourceSettings) -> dict[str, float]:
    """The sweeps that the mirror, if there is one, has: names, and when each was begun, in seconds since 1970.

    Raises:
        UserError: the mirror does not answer.
    """
    if not resources.mirror:
        return {}
    sweeps = Path(resources.storage).absolute() / "sweeps"
    with _refusing(SharedStore(resources.mirror, SETTING)) as store:
        known = [Mirror(resources, sweeps / name) for name in sorted(store.names(sweeps.name))]
        owners = {mirror.folder.name: mirror.ownership.owner() for mirror in known if mirror.there}
    if strange := [name for name, owner in owners.items() if not owner]:
        note(f"{store}: left out, since no {NOTE} tells who copied them there: {', '.join(strange)}")
    return {name: owner["begun"] for name, owner in owners.items() if owner}


def is_in_mirror(resources: ResourceSettings, folder: Path) -> bool:
    """Whether the mirror, if there is one, has a training or sweep of this name.

    Raises:
        UserError: the mirror does not answer.
    """
    if not resources.mirror:
        return False
    mirror = Mirror(resources, folder)
    with _refusing(mirror.store):
        return mirror.there


@contextmanager
def _refusing(store: SharedStore) -> Iterator[SharedStore]:
    """Let what the store does not do end the script in a line."""
    try:
        yield store
    except OSError as error:
        raise UserError(f"{_words(error, store)}; is it the right address, and may you write there?") from None


def _words(error: Exception, store: SharedStore) -> str:
    said = str(getattr(error, "strerror", None) or error) or type(error).__name__
    if isinstance(error, OSError) and error.filename:
        said = storage_fault(error) or str(error)
    return said if said.startswith(f"{store}") else f"{store}: {said}"
