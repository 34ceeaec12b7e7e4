"""The data of a run as MLflow's inputs: how many, about whom, and how their labels are spread."""

import json
import os
import platform
import socket
import subprocess
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag

from umbrella.conversations.schema import Conversation


def describe(
    split: str, conversations: Sequence[Conversation], fingerprint: str, paths: Sequence[str]
) -> dict[str, Any]:
    """What is told of a split. Classes are counted, numbers have their mean; nobody is named.

    Args:
        split: "training", "validation" or "test", the context of MLflow's input.
        fingerprint: of the data that the split is of.
        paths: where they come from; none where from the phantom cohort.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    numbers: dict[str, list[float]] = defaultdict(list)
    for c in conversations:
        if isinstance(c.label, str):
            counts[c.target][c.label] += 1
        elif c.label is not None:
            numbers[c.target].append(float(c.label))
    labels: dict[str, Any] = {target: dict(sorted(count.items())) for target, count in sorted(counts.items())}
    labels |= {t: {"count": len(some), "mean": sum(some) / len(some)} for t, some in sorted(numbers.items())}
    return {
        "name": split,
        "digest": fingerprint,
        "source": ", ".join(paths) or "phantom cohort",
        "profile": {
            "split": split,
            "conversations": len(conversations),
            "subjects": len({c.subject_id for c in conversations}),
            "labels": labels,
        },
    }


def to_input(told: Mapping[str, Any]) -> DatasetInput:
    """``describe``'s answer as MLflow has it."""
    dataset = Dataset(
        name=told["name"],
        digest=told["digest"],
        source_type="local",
        source=json.dumps({"uri": told["source"]}),
        profile=json.dumps(told["profile"]),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", told["name"])])


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
