"""Population-based training: a trial goes on from another one's checkpoint, and its folder says so.

Whoever runs the sweep may be killed at any moment, and Ray Tune's notes are some seconds old then. So the folders alone
say what was decided:

- Before an adoption's note is written, nothing has changed: it is decided again.
- From its note on it is so, whatever Ray Tune knows; what is left to do, ``settle`` does when the sweep goes on.
- Whoever has adopted at a step, or has gone past it, is not decided on there again, when its evaluations are told
  again (``stand_at``): neither gives nor takes.
- Whoever has lost the checkpoint of an adoption goes back to before it, with the values that it had (``settle``).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from umbrella.storage import link_or_copy, put_text
from umbrella.training.filenames import ADOPTED
from umbrella.training.history import read_history
from umbrella.training.progress import (
    FILES,
    METRICS,
    checkpoint_folder,
    delete,
    latest_checkpoint,
    read_progress,
    to_disk,
    write_files,
)
from umbrella.tuning.folder import POINT
from umbrella.tuning.space import label


class Adoption(NamedTuple):
    """From ``step`` on a trial went on with the weights of another one, ``source``, and with other values."""

    step: int
    source: str
    """That trial's folder below the sweep's ``trials``."""
    before: dict[str, Any]
    """The trial's point until then."""
    donor: dict[str, Any]
    """The other one's point at that time."""
    after: dict[str, Any]

    @property
    def giver(self) -> str:
        """The other trial in words."""
        return f"{self.source} ({label(self.donor)})"

    @property
    def change(self) -> str:
        """Which values changed, in words."""
        changed = {name: value for name, value in self.after.items() if self.before[name] != value}
        return f"{label({n: self.before[n] for n in changed})} became {label(changed)}" if changed else "none changed"

    @property
    def in_words(self) -> str:
        """All of it in a line."""
        return f"after step {self.step} from {self.giver}; {self.change}"


def stand_at(evaluation: int, *folders: Path) -> bool:
    """Whether all these trials have come to an evaluation, each with a checkpoint of its own, and no further."""
    steps = {_stands(evaluation, folder) for folder in folders}
    return len(steps) == 1 and None not in steps


def _stands(evaluation: int, folder: Path) -> int | None:
    last = (read_history(folder) or [{}])[-1]
    if last.get("evaluation") != evaluation:
        return None
    step = last["step"]
    # One that was stopped between two evaluations has a newer checkpoint.
    own = latest_checkpoint(folder) == checkpoint_folder(folder, step)
    return step if own and all(adoption.step != step for adoption in read_adoptions(folder)) else None


def adopt(
    folder: Path, source: Path, before: Mapping[str, Any], donor: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    """Let a trial go on from another one's last checkpoint. Both ``stand_at`` the same evaluation.

    Its own checkpoint of that step makes room. What was measured there belongs to the other trial, so it is taken out:
    a trial's best is its own.
    """
    step = read_history(source)[-1]["step"]
    partial = _partial(folder, step)
    shutil.rmtree(partial, ignore_errors=True)
    own_files = shutil.ignore_patterns(METRICS, FILES)  # to write to a second name would change the other one's file
    shutil.copytree(checkpoint_folder(source, step), partial, copy_function=link_or_copy, ignore=own_files)
    (partial / METRICS).write_text("{}", encoding="utf-8")
    write_files(partial)
    adoption = Adoption(step, source.name, dict(before), dict(donor), dict(after))
    _note(folder, (*read_adoptions(folder), adoption))
    _take(folder, step)


def settle(folder: Path) -> None:
    """Bring a trial, while it does not train, to where its folder says that it is, whatever was killed meanwhile."""
    adoptions = read_adoptions(folder)
    if not adoptions:
        return
    _take(folder, adoptions[-1].step)
    latest = latest_checkpoint(folder)
    step = read_progress(latest).step if latest else 0
    if adoptions[-1].step > step:  # its checkpoint is broken
        _note(folder, tuple(adoption for adoption in adoptions if adoption.step <= step))


def read_point(folder: str | Path) -> dict[str, Any]:
    """The point that a trial goes on with: the one that it began with, until it adopted."""
    adoptions = read_adoptions(folder)
    return adoptions[-1].after if adoptions else json.loads((Path(folder) / POINT).read_text(encoding="utf-8"))


def read_adoptions(folder: str | Path) -> tuple[Adoption, ...]:
    """What a trial has adopted, by step."""
    file = Path(folder) / ADOPTED
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return tuple(Adoption(**json.loads(line)) for line in lines)


def tags_of(folder: str | Path) -> dict[str, str]:
    """What a trial's run in MLflow is tagged with, for what it has adopted."""
    return {"adopted": in_words(read_adoptions(folder))} if Path(folder, ADOPTED).exists() else {}


def in_words(adoptions: Sequence[Adoption]) -> str:
    """All of them in a line; empty where there are none."""
    return " | ".join(adoption.in_words for adoption in adoptions)


def _partial(folder: Path, step: int) -> Path:
    return folder / f".{checkpoint_folder(folder, step).name}.adopted"


def _take(folder: Path, step: int) -> None:
    """Put an adopted checkpoint, which has been noted, in the place of the trial's own."""
    partial, own = _partial(folder, step), checkpoint_folder(folder, step)
    if partial.exists():
        if own.exists():
            delete(own)
        partial.rename(own)
        to_disk(folder)


def _note(folder: Path, adoptions: Sequence[Adoption]) -> None:
    put_text(folder / ADOPTED, "".join(f"{json.dumps(adoption._asdict())}\n" for adoption in adoptions))
    to_disk(folder / ADOPTED)
    to_disk(folder)
