"""Population-based training: a trial goes on from another one's checkpoint, and its folder says so."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from umbrella.storage import link_or_copy
from umbrella.training.history import read_history
from umbrella.training.progress import FILES, METRICS, checkpoint_folder, delete, what_is_wrong, write_files
from umbrella.tuning.space import label

ADOPTED = "adopted.jsonl"


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
    """Whether all these trials have come to an evaluation, each with its checkpoint, and no further."""
    last = [(read_history(folder) or [{}])[-1] for folder in folders]
    whole = [
        row.get("evaluation") == evaluation and not what_is_wrong(checkpoint_folder(folder, row["step"]))
        for folder, row in zip(folders, last, strict=True)
    ]
    return all(whole) and len({row["step"] for row in last}) == 1


def adopt(
    folder: Path, source: Path, before: Mapping[str, Any], donor: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    """Let a trial go on from another one's last checkpoint. Both ``stand_at`` the same evaluation.

    Its own checkpoint of that step makes room. What was measured there belongs to the other trial, so it is taken out:
    a trial's best is its own.
    """
    step = read_history(source)[-1]["step"]
    given = checkpoint_folder(source, step)
    partial = folder / f".{given.name}.adopted"
    shutil.rmtree(partial, ignore_errors=True)
    own_files = shutil.ignore_patterns(METRICS, FILES)  # to write to a second name would change the other one's file
    shutil.copytree(given, partial, copy_function=link_or_copy, ignore=own_files)
    (partial / METRICS).write_text("{}", encoding="utf-8")
    write_files(partial)
    own = checkpoint_folder(folder, step)
    if own.exists():
        delete(own)
    partial.rename(own)
    adoption = Adoption(step, source.name, dict(before), dict(donor), dict(after))
    with (folder / ADOPTED).open("a", encoding="utf-8") as file:
        print(json.dumps(adoption._asdict()), file=file, flush=True)


def read_adoptions(folder: str | Path) -> tuple[Adoption, ...]:
    """What a trial has adopted, by step; of what was done again after a kill, the last."""
    file = Path(folder) / ADOPTED
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    found = [Adoption(**json.loads(line)) for line in lines if line.endswith("\n")]
    return tuple({adoption.step: adoption for adoption in found}.values())
