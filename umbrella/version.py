"""Which version of UMBRELLA wrote a checkpoint, a training or a sweep, and whether this one reads it."""

import json
import re
from pathlib import Path
from typing import Any

from umbrella.base import UserError
from umbrella.paths import CODE

__version__ = "0.2.0"
OLDEST = "0.2.0"
"""The oldest version whose checkpoints, trainings and sweeps this one reads."""


def write_version(folder: str | Path) -> None:
    """Note in a folder that this version wrote it."""
    (Path(folder) / CODE).write_text(json.dumps({"umbrella": __version__}, indent=1), encoding="utf-8")


def check_version(place: str | Path, **hub: Any) -> None:
    """Refuse a folder that was written by a version older than ``OLDEST``.

    Args:
        place: the folder of a checkpoint, training or sweep of ours; or a checkpoint's name on a hub.
        hub: options of ``transformers.utils.cached_file``, for a name on a hub.

    Raises:
        UserError: it is too old, or the file that names the version is absent or cannot be read.
    """
    then = _written_by(place, hub)
    if then is None or _numbers(then) < _numbers(OLDEST):
        named = f"umbrella {then}" if then else f"a version before {OLDEST}"
        raise UserError(
            f"{place}: was written by {named}, and umbrella {__version__} reads what {OLDEST} and later versions write;"
            " train again, or use the version that wrote it"
        )


def _written_by(place: str | Path, hub: dict[str, Any]) -> str | None:
    """The version that ``code.json`` names; None if there is no such file, or it names none."""
    file = Path(place) / CODE
    try:
        if not Path(place).is_dir():
            from transformers.utils import cached_file  # a second, which folders do not need

            file = Path(str(cached_file(str(place), CODE, **hub)))
        version = json.loads(file.read_text(encoding="utf-8"))["umbrella"]
    except FileNotFoundError:
        return None
    except OSError as error:  # also of a hub, which says the same of a missing file and of a network that is down
        why = error.strerror or " ".join(str(error).split())[:200]
        remedy = f"versions of umbrella before {OLDEST} did not write it, and theirs do not load"
        raise UserError(f"{place}: {CODE} cannot be read: {why}; {remedy}") from None
    except (ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) else None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
