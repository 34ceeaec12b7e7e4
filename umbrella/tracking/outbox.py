"""What MLflow is to be told, on disk until it has been: a file of JSON lines in the training's folder."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from umbrella.locking import lock

Message = Mapping[str, Any]

FOLDER = "tracking"
"""Where a training's folder holds what MLflow does not know yet, and which run is its own."""
OUTBOX, RUN = "outbox.jsonl", "run.json"
"""Files of it, one of each per store. The second, see ``delivery``, says up to which step all is sent, or in
the first."""
LOCKS = WRITING, SENDING = "outbox.lock", "outbox.sending"


class Outbox:
    """Messages in their order. Several threads and processes of one machine may put and send.

    A message is here before it is sent, and goes when it was: a process that is killed in between sends it again. So
    messages must be such that sending one twice is the same as once.

    Each method that changes it raises NoLocks where the folder has none: what several write would be lost.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / OUTBOX

    def put(self, message: Message) -> None:
        """Add a message: all of it or, if this process is killed meanwhile, nothing."""
        with self._locked(WRITING), self.file.open("ab") as file:
            whole = len(self._content())
            if file.tell() != whole:  # half a line of a process that was killed
                file.truncate(whole)
            file.write(json.dumps(message).encode() + b"\n")

    def keep(self, name: str, content: bytes) -> str:
        """Keep a file until it is sent; returns its path in the folder, which ends in its name."""
        file = self.folder / "files" / uuid.uuid4().hex / name
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        return str(file.relative_to(self.folder))

    def waiting(self) -> list[dict[str, Any]]:
        """The messages that are not sent yet."""
        return [json.loads(line) for line in self._content().splitlines()]

    def drain(self, send: Callable[[Message], None]) -> None:
        """Send all messages in order, also those that come meanwhile. Does nothing while another one does that.

        Raises:
            whatever ``send`` does; its message, and those behind it, stay.
        """
        with self._locked(SENDING, wait=False) as alone:
            while alone and (lines := self._content().splitlines(keepends=True)):
                done = 0
                try:
                    for line in lines:
                        send(json.loads(line))
                        done += len(line)
                finally:
                    self._drop(done)

    def _content(self) -> bytes:
        """The whole lines of the file."""
        try:
            content = self.file.read_bytes()
        except FileNotFoundError:
            return b""
        return content[: content.rfind(b"\n") + 1]

    def _drop(self, size: int) -> None:
        with self._locked(WRITING):
            content = self._content()
            if len(content) > size:
                rest = self.folder / "outbox.rest"
                rest.write_bytes(content[size:])
                os.replace(rest, self.file)
            else:
                self.file.unlink(missing_ok=True)
        if not self.file.exists():
            shutil.rmtree(self.folder / "files", ignore_errors=True)

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Gives whether this one has the lock. A process that is killed gives its locks back."""
        with (self.folder / name).open("w") as file:
            yield lock(file, wait)
