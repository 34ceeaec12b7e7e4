"""What a run ran on and with: packages, Python, CUDA, machine. Nothing of the environment's variables."""

import json
import os
import platform
import socket
import subprocess
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions and machine of this process, to be written as JSON."""
    import torch

    packages = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"]}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        **{name: packages.get(name) for name in ("torch", "ray", "transformers", "mlflow")},
        "packages": [f"{name}=={packages[name]}" for name in sorted(packages, key=str.lower)],
    }


@cache
def environment_json() -> str:
    """``environment`` as an indented text. Done once: reading what is installed takes a quarter of a second."""
    return json.dumps(environment(), indent=1)


def code_version() -> dict[str, str]:
    """The git commit of this code and whether files differ from it; outside a checkout, UMBRELLA_COMMIT of an image."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the checkout around us is somebody else's
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "git.dirty": str(bool(git("status", "--porcelain"))),
        }
    commit = os.environ.get("UMBRELLA_COMMIT")
    return {"mlflow.source.git.commit": commit} if commit else {}
