"""Trainings and sweeps in ``resources.mirror``: copied there while they run, fetched where this machine lacks them."""

import json
import os
import shutil
import socket
import sys
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
from umbrella.training.settings import ResourceSettings

SETTING = "resources.mirror"
NOTE = ".mirror.json"
"""In the mirror: who writes there. Beside the files that are copied: who has, from here, and what is there."""
EVERY = 10.0
"""Seconds between two looks for what is new."""
SILENT = 30.0
"""Seconds without a sign after which whoever wrote to a mirror is taken to be gone. Several times ``EVERY``."""
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
        self.session, self._beat, self._saved = uuid4().hex, 0, ""
        self.sessions: list[str] = []
        """Those that have written there what is here, or what this is to go on from."""
        self._ending, self._given_up = threading.Event(), threading.Event()
        self._failed, self._lost, self._signed = "", "", 0.0
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
            owner, (self.sessions, copied) = self.owner(), self._known()
            if self.here and owner and owner["session"] not in self.sessions:
                raise UserError(
                    f"{self.store}: {self.name} went on elsewhere (on {owner['host']}) since it was here; to go on with"
                    f" that one, delete {self.folder} or move it away; to keep this one, take another mirror"
                )
            if not self.here:
                self._wait_for_silence(owner)
                self.sessions = [owner["session"]] if owner else []
                if self.there:
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
        if not self._lost and (self._failed or self._thread.is_alive()):
            why = self._failed or f"{self.store}: does not answer"
            _note(f"{self._left()} of {self.name} not copied: {why}; {self._again} copies them")

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
        while not self._lost:
            self._round()  # the first one at once: others see that this name is taken
            if self._ending.wait(EVERY):
                break
        failed, first = 0, 0.0
        while not (self._lost or self._round(last=True) or self._given_up.wait(1.0)):
            failed, first = failed + 1, first or time.monotonic()
            if failed >= TRIES and time.monotonic() - first > LAST_WAIT:
                break

    def _round(self, last: bool = False) -> bool:
        """Copy once; returns whether that worked. What does not is said once, and once when it works again."""
        try:
            self._claim()
            if self._lost:
                return False
            if not self.here:
                if last and not self.there:  # nothing was begun
                    self.store.delete(f"{self.name}/{NOTE}")
                return True
            try:
                self.copy.round()
            finally:
                self._remember(self.copy.copied)
            if last:
                self._sign(writing=False)
        except Exception as error:  # whatever it is: no training ends for want of its copy
            if self._lost:
                return False
            if not self._failed:
                _note(f"{_words(error, self.store)}; {self.name} is not copied for now, and tried again")
            self._failed = _words(error, self.store)
            return False
        if self._failed:
            _note(f"{self.store}: works again, and has all of {self.name}")
        self._failed = ""
        return True

    def _claim(self) -> None:
        """Let others see that this script writes here, unless another one does."""
        owner, own = self.owner(), {self.session} if self._beat else {self.session, *self.sessions}
        if owner and owner["session"] not in own:
            self._lost = f"{self.name} is being copied there from {owner['host']} now"
            _note(f"{self.store}: {self._lost}; nothing more is copied from here")
            return
        if self.session not in self.sessions:
            self.sessions.append(self.session)
        if self.here:
            self._remember(self.copy.copied)
        self._sign(writing=True)

    def _sign(self, writing: bool) -> None:
        self._beat += 1
        told = {"session": self.session, "host": socket.gethostname(), "beat": self._beat, "writing": writing}
        told["begun"] = (self.folder / self.begun).stat().st_mtime if self.here else time.time()
        self.store.put(f"{self.name}/{NOTE}", json.dumps(told).encode())
        self._signed = time.monotonic()

    def _live(self) -> None:
        """Give a sign now and then in a long round; raises OSError where another script has taken over meanwhile."""
        if not self._lost and time.monotonic() - self._signed > EVERY:
            self._claim()
        if self._lost:
            raise OSError(self._lost)

    def owner(self) -> dict[str, Any]:
        """Who wrote there last: session, host, how many signs, whether it may still do; and when all this was begun."""
        return json.loads(self.store.read(f"{self.name}/{NOTE}") or b"{}")

    def _wait_for_silence(self, owner: dict[str, Any]) -> None:
        if not owner.get("writing"):
            return
        _note(f"{self.name} was not ended on {owner['host']}: waiting {SILENT:g} s for a sign that it goes on there")
        until = time.monotonic() + SILENT
        while time.monotonic() < until:
            time.sleep(min(1.0, SILENT / 10))
            if self.owner() != owner:
                raise UserError(f"{self.store}: {self.name} is being copied there from {owner['host']}; stop it there")

    def _known(self) -> tuple[list[str], dict[str, Stamp]]:
        """What is known here: the sessions that have written from this folder, and what lies there."""
        try:
            known = json.loads((self.folder / NOTE).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return [], {}
        return known["sessions"], {name: tuple(stamp) for name, stamp in known["copied"].items()}

    def _remember(self, copied: dict[str, Stamp], folder: Path | None = None) -> None:
        text = json.dumps({"sessions": self.sessions, "copied": copied})
        if text != self._saved:
            put_text((folder or self.folder) / NOTE, text)
            self._saved = text


def in_mirror(resources: ResourceSettings, kind: str) -> dict[str, float]:
    """The trainings or sweeps that the mirror has, by name, and when each was begun, in seconds since 1970.

    Args:
        kind: "trainings" or "sweeps".

    Raises:
        UserError: the mirror does not answer.
    """
    if not resources.mirror:
        return {}
    place = Path(resources.storage).absolute() / kind
    with _refusing(SharedStore(resources.mirror, SETTING)) as store:
        known = [Mirror(resources, place / name) for name in sorted(store.names(kind))]
        owners = {mirror.folder.name: mirror.owner() for mirror in known if mirror.there}
    if strange := [name for name, owner in owners.items() if not owner]:
        _note(f"{store}: left out, since no {NOTE} tells who copied them there: {', '.join(strange)}")
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


def _note(words: str) -> None:
    print(f"note: {words}", file=sys.stderr, flush=True)
