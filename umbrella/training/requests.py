"""What is asked of a training from outside: to stop.

It is an empty file in the training's folder, which every worker's machine shares; the script makes it at SIGTERM.
Workers look for it, see ``stop_signal``; while they do, there is another empty file. Whoever asks need not import what they
do.
"""

import sys
from pathlib import Path

from umbrella.paths import STOP, WORKERS


def stop_file(folder: str | Path) -> Path:
    """The file by which a training is asked to stop."""
    return Path(folder) / STOP


def workers_file(folder: str | Path) -> Path:
    """The file that exists while workers run that look for ``stop_file``."""
    return Path(folder) / WORKERS


def ask_to_stop(folder: str | Path) -> None:
    """Ask the training of a folder to stop, and say so."""
    stop_file(folder).touch()
    print("SIGTERM: the training will stop after this step and write a checkpoint", file=sys.stderr, flush=True)
