"""Runs in MLflow: one per training; trials of a sweep are children of one parent run."""

import posixpath
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from umbrella.base import UserError, masked
from umbrella.tracking.delivery import DRIVER, PARENT, TRIAL, Delivery
from umbrella.tracking.drivers import driver_id
from umbrella.tracking.environment import code_version
from umbrella.tracking.keys import KEY, run_key, trial_key
from umbrella.tracking.machine import Machine
from umbrella.tracking.outbox import FOLDER, Outbox
from umbrella.tracking.store import can_wait, is_local, store_key

RETRY = 30.0
"""Seconds after which a store that did not answer is asked again."""
LAST_WAIT = 20.0
"""Seconds that the end of a run waits for a store that does not answer."""


def is_name(target: str) -> bool:
    """Whether MLflow takes metrics that have this in the midst of their names."""
    return is_metric(f"eval/{target}/balanced_accuracy")


def is_metric(name: str) -> bool:
    """Whether MLflow takes a metric of this name."""
    return re.fullmatch(r"[\w\-. :/]{1,250}", name) is not None and posixpath.normpath(name) == name


class Tracker:
    """One MLflow run. Nothing here waits for long, and nothing is lost, where the store does not answer.

    Metrics are gathered and written together by ``flush``, since each request costs up to 70 ms. Everything is written
    to the run's outbox first, and sent from there.

    Args:
        folder: of the training; holds its outbox and what is known of its run. None: one that goes with this object.
    """

    def __init__(self, uri: str, folder: str | Path | None = None) -> None:
        self.uri, self.client = uri, MlflowClient(uri)
        self._temporary = None if folder else tempfile.TemporaryDirectory()
        self.folder = Path(folder or self._temporary.name) / FOLDER / store_key(uri)  # type: ignore[union-attr]
        self.outbox = Outbox(self.folder)
        self._delivery = Delivery(uri, self.client, self.folder)
        self._pending: list[tuple[str, float, int, int]] = []
        self._machine: Machine | None = None
        self._next_try, self._said = 0.0, False
        self._known_until = -1
        self.anew = False
        """Whether the run is another one than before, which this store does not have or somebody deleted there."""

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        name: str,
        *,
        parent: str | None = None,
        trial: str | None = None,
        driver: str | None = None,
        folder: str | Path | None = None,
    ) -> "Tracker":
        """A new run, or the one that this training or trial already has, see ``keys``.

        Args:
            trial: the training's name among all; of a trial of ``parent`` it also tells it from the others.
            driver: the script that the run belongs to, see ``drivers``; this process when None.
        """
        tracker = cls(uri, folder)
        driver = driver or driver_id()
        before = tracker._delivery.state.get("run_id")
        tracker._delivery.remember(driver=driver, ended=False)
        tags = {"mlflow.source.name": "umbrella", **code_version(), DRIVER: driver}
        tags |= {PARENT: parent} if parent else {}
        tags |= {TRIAL: trial} if trial else {}
        tags[KEY] = trial_key(parent, trial) if parent and trial else run_key(tracker.folder.parents[1])
        start = {"do": "start", "experiment": experiment, "name": name, "tags": tags, "time": _now()}
        tracker._put(start | {"known": tracker._delivery.state.get("until", -1)})
        tracker._deliver()
        tracker.anew = before not in (None, tracker._delivery.state.get("run_id"))
        # Of a training that goes on: up to this step everything is sent, or will be.
        waiting = [message["until"] for message in tracker.outbox.waiting() if "until" in message]
        tracker._known_until = max([tracker._delivery.state.get("until", -1), *waiting])
        return tracker

    @property
    def run_id(self) -> str:
        """The run's id in MLflow.

        Raises:
            UserError: it has none yet, because the store does not answer.
        """
        run_id = self._delivery.state.get("run_id")
        if not run_id:
            raise UserError(f"MLflow at {masked(self.uri)} does not answer, so the run has no id yet; try again later")
        return run_id

    @property
    def driver(self) -> str | None:
        """The script that the run belongs to."""
        return self._delivery.state.get("driver")

    @property
    def ended(self) -> bool:
        """Whether ``end`` was called since the run was last started, by whichever process."""
        return bool(self._delivery.state.get("ended"))

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; a resumed run keeps what it has."""
        self._send({"do": "params", "values": {name: str(value) for name, value in values.items()}})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags."""
        self._send({"do": "tags", "values": {name: str(value) for name, value in values.items()}})

    def inputs(self, datasets: Sequence[Mapping[str, Any]]) -> None:
        """Log what the run reads, see ``datasets.describe``."""
        self._send({"do": "inputs", "values": [dict(told) for told in datasets]})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Gather metrics of a step, unless the run has them from before it was interrupted."""
        now = _now()
        if step > self._known_until:
            self._pending += [(name, float(value), now, step) for name, value in values.items()]

    def results(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics of what came after a step, such as an evaluation of its checkpoint; the run may have ended.

        What was logged so before is logged again where it has changed, and is then the metric's value.
        """
        now, told = _now(), {name: [step, float(value)] for name, value in values.items()}
        known = self._delivery.state.get("results", {})
        new = [(name, value, now, step) for name, (step, value) in told.items() if known.get(name) != told[name]]
        if new:
            self._put({"do": "metrics", "values": new})
            self._delivery.remember(results=known | told)
        self._deliver()

    def flush(self) -> None:
        """Write the gathered metrics, and what the machine did meanwhile."""
        pending, self._pending = self._pending, []
        until = max((step for *_, step in pending), default=-1)
        if self._machine:
            pending += self._machine.taken()
            self._machine.may_write = True
        # By name: MLflow's compare page opens with the metric that was written first, and best/... is what decides.
        if pending:
            self._put({"do": "metrics", "values": sorted(pending, key=lambda metric: metric[0])} | _until(until))
        if until >= 0:
            self._delivery.remember(until=until)
        self._deliver()

    def watch_system(self) -> None:
        """From now to the end also write what this machine does, see ``Machine``."""
        start = self._delivery.state.get("start", _now())
        self._machine = Machine(start, self._put, self._deliver)
        self._machine.start()

    def text(self, content: str, file: str) -> None:
        """Save a text as an artifact."""
        self.save(content.encode(), file)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Save a file, as it is now, as an artifact."""
        self.save(Path(path).read_bytes(), posixpath.join(folder or "", Path(path).name))

    def save(self, content: bytes, file: str) -> None:
        """Save bytes as an artifact."""
        kept = self.outbox.keep(posixpath.basename(file), content)
        self._send({"do": "file", "path": kept, "to": posixpath.dirname(file)})

    def folder_artifact(self, path: str | Path, folder: str) -> None:
        """Save a folder's files as artifacts. No copy: it has to stay where it is until they are sent."""
        self._send({"do": "folder", "path": str(path), "to": folder})

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric over the whole run, as MLflow has it; empty where that does not answer."""
        try:
            found = [] if self.outbox.waiting() else self.client.get_metric_history(self.run_id, name)
        except Exception as error:
            if not can_wait(error, self.uri):
                raise
            return []
        return sorted((metric.step, metric.value) for metric in found)

    def end(self, status: str = "FINISHED", outcome: str = "finished", wait: float = LAST_WAIT) -> None:
        """Close the run. ``status``: FINISHED, FAILED or KILLED; ``outcome``: also tells early stopping apart.

        Args:
            wait: seconds to try for where the store does not answer.
        """
        if self._machine:
            self._machine.stop()
        self.flush()
        self._put({"do": "end", "status": status, "outcome": outcome, "time": _now()})
        self._delivery.remember(ended=True)
        until = time.monotonic() + wait
        self._deliver()
        while self.outbox.waiting() and time.monotonic() < until:
            time.sleep(0.2 if is_local(self.uri) else 1.0)
            self._deliver(again=True)
        if waiting := len(self.outbox.waiting()):
            where = f"{self.outbox.file}: {waiting} messages, sent when this run goes on or another one begins"
            _note(f"MLflow at {masked(self.uri)} still does not answer; what it missed stays in {where}")

    def _send(self, message: Mapping[str, Any]) -> None:
        self._put(message)
        self._deliver()

    def _put(self, message: Mapping[str, Any]) -> None:
        self.outbox.put(message)

    def _deliver(self, again: bool = False) -> None:
        """Send what waits, unless the store has just failed to answer. ``again``: all the same."""
        if not again and time.monotonic() < self._next_try:
            return
        try:
            self.outbox.drain(self._delivery)
        except Exception as error:
            if not can_wait(error, self.uri):
                raise
            self._next_try = time.monotonic() + RETRY
            if not self._said:
                self._said = True
                _note(f"MLflow at {masked(self.uri)} does not answer: kept in {self.outbox.file}, sent later")
        else:
            self._next_try, self._said = 0.0, False


def _until(step: int) -> dict[str, int]:
    return {"until": step} if step >= 0 else {}


def _now() -> int:
    return int(time.time() * 1000)


def _note(words: str) -> None:
    print(f"note: {words}", file=sys.stderr, flush=True)
