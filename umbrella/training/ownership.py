"""Whose a place in the mirror is: one script's at a time, which gives signs there that it lives."""

import json
import socket
import sys
import time
from typing import Any
from uuid import uuid4

from umbrella.base import UserError
from umbrella.shared_store import SharedStore

NOTE = ".mirror.json"
"""In the mirror: who writes there. Beside the files that are copied: who has, from here, and what is there."""
SILENT = 30.0
"""Seconds without a sign after which whoever wrote to a mirror is taken to be gone. Several times ``mirror.EVERY``."""


class Ownership:
    """One script's claim to a training's or sweep's place in the mirror.

    Args:
        name: of the place, as in "trainings/first".
    """

    def __init__(self, store: SharedStore, name: str) -> None:
        self.store, self.name, self.session = store, name, uuid4().hex
        self.sessions: list[str] = []
        """Those that have written there what is here, or what this is to go on from."""
        self.lost = ""
        """Why nothing more may be copied from here."""
        self.signed = 0.0
        self._beat = 0

    def owner(self) -> dict[str, Any]:
        """Who wrote there last: session, host, how many signs, whether it may still do; and when all this was begun."""
        return json.loads(self.store.read(f"{self.name}/{NOTE}") or b"{}")

    def wait_for_silence(self, owner: dict[str, Any]) -> None:
        """Wait until an owner that did not end is taken to be gone; raises UserError where it is not."""
        if not owner.get("writing"):
            return
        note(f"{self.name} was not ended on {owner['host']}: waiting {SILENT:g} s for a sign that it goes on there")
        until = time.monotonic() + SILENT
        while time.monotonic() < until:
            time.sleep(min(1.0, SILENT / 10))
            if self.owner() != owner:
                raise UserError(f"{self.store}: {self.name} is being copied there from {owner['host']}; stop it there")

    def may(self) -> bool:
        """Whether this script may write there: no other one has, since it began to. Else it is lost, which is said."""
        owner, own = self.owner(), {self.session} if self._beat else {self.session, *self.sessions}
        if owner and owner["session"] not in own:
            self.lost = f"{self.name} is being copied there from {owner['host']} now"
            note(f"{self.store}: {self.lost}; nothing more is copied from here")
            return False
        if self.session not in self.sessions:
            self.sessions.append(self.session)
        return True

    def sign(self, begun: float, writing: bool) -> None:
        """Let others see that this script writes there, or has ended. ``begun``: when all this was, in s since 1970."""
        self._beat += 1
        told = {"session": self.session, "host": socket.gethostname(), "beat": self._beat, "writing": writing}
        self.store.put(f"{self.name}/{NOTE}", json.dumps(told | {"begun": begun}).encode())
        self.signed = time.monotonic()

    def leave(self) -> None:
        """Take the sign away, where nothing was begun."""
        self.store.delete(f"{self.name}/{NOTE}")


def note(words: str) -> None:
    """Say something of the mirror on standard error."""
    print(f"note: {words}", file=sys.stderr, flush=True)
