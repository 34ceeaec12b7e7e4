"""The version of UMBRELLA, and the check of the version that wrote a checkpoint, training or sweep."""

import json
import re
from pathlib import Path
from typing import Any

from umbrella.base import UserError
from umbrella.paths import CODE

__version__ = "0.3.0"
OLDEST = "0.2.0"
"""Oldest version whose checkpoints, trainings and sweeps can be read."""


def write_version(folder: str | Path) -> None:
    """Write the current version to a folder."""
    (Path(folder) / CODE).write_text(json.dumps({"umbrella": __version__}, indent=1), encoding="utf-8")


def check_version(place: str | Path, **hub: Any) -> None:
    """Check that a folder was not written by a version older than ``OLDEST``.

    Args:
        place: folder of a checkpoint, training or sweep; or name of a checkpoint on the Hugging Face Hub.
        hub: options of ``transformers.utils.cached_file``, for a name on the Hub.

    Raises:
        UserError: the version is too old, or the file with the version is missing or cannot be read.
    """
    file, version = Path(place) / CODE, ""
    try:
        if not Path(place).is_dir():
            from transformers.utils import cached_file  # the import takes a second, and folders do not need it

            file = Path(str(cached_file(str(place), CODE, **hub)))
        version = str(json.loads(file.read_text(encoding="utf-8"))["umbrella"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    except OSError as error:  # the Hub raises OSError both for a missing file and without network
        why = error.strerror or " ".join(str(error).split())[:200]
        remedy = f"versions of umbrella before {OLDEST} did not write it, and theirs do not load"
        raise UserError(f"{place}: {CODE} cannot be read: {why}; {remedy}") from None
    if _numbers(version) < _numbers(OLDEST):
        found = f"umbrella {version}" if version else f"a version before {OLDEST}"
        raise UserError(
            f"{place}: was written by {found}, and umbrella {__version__} reads what {OLDEST} and later versions write;"
            " train again, or use the version that wrote it"
        )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
