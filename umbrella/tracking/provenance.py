"""Describe the settings, datasets, environment and code version of a run; replace subject ids by hashes.

A subject has one hash in a storage folder, and another one in another folder.
"""

import hashlib
import hmac
import json
import os
import platform
import re
import secrets
import socket
import subprocess
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import fmean
from tempfile import NamedTemporaryFile
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag

from umbrella.config import Settings
from umbrella.conversations.schema import Conversation, questions_of
from umbrella.paths import SALT

HEADLINES = {
    "": ("seed",),
    "data": ("modality", "task_filter"),
    "mask": ("supervise", "end_of_turn", "normalize"),
    "model": ("checkpoint", "train", "embedder_init", "dtype"),
    "loss": ("numbers",),
    "optim": ("lr", "embedder_lr", "weight_decay", "warmup", "schedule"),
    "train": ("epochs", "batch_size", "accumulate"),
    "tune": ("metric", "mode"),
    "baseline": ("modality",),
}
"""Settings by section that are parameters of a run in MLflow, beside the swept ones. Its settings.yaml has all."""
IF_CHANGED = ("model.frozen_dtype", "train.tokens_per_batch")
"""Settings that are parameters, too, unless they have their defaults."""


def headline_settings(settings: Settings, unused: Collection[str] = ()) -> dict[str, Any]:
    """Return ``HEADLINES``, ``IF_CHANGED`` and the settings of ``tune.space`` by name, without ``unused`` sections."""
    swept, found, defaults = tuple(f"{name}." for name in settings.tune.space), {}, Settings().flat()
    for name, value in settings.flat().items():
        section, _, last = name.rpartition(".")
        chosen = last in HEADLINES.get(section, ()) or f"{name}.".startswith(swept)
        changed = name in IF_CHANGED and value != defaults[name]
        if (chosen or changed) and name.split(".")[0] not in unused:
            found[name] = value
    return found


def describe_dataset(
    split: str, conversations: Sequence[Conversation], fingerprint: str, paths: Sequence[str]
) -> dict[str, Any]:
    """Describe a split for MLflow: number of conversations and subjects, and the distribution of labels.

    No subject ids are included.

    Args:
        split: "training", "validation" or "test", the context of MLflow's dataset input.
        fingerprint: hash of the data.
        paths: files of the conversations; empty for the phantom cohort.

    Returns:
        Name, digest, source and profile. Per target, the profile has class counts, or count and mean of numbers.
    """
    labels: dict[str, Any] = {}
    questions = questions_of(conversations)
    for target in sorted({q.target for q in questions if q.label is not None}):
        values = [q.label for q in questions if q.target == target and q.label is not None]
        numbers = [float(value) for value in values if not isinstance(value, str)]
        counts = dict(sorted(Counter(map(str, values)).items()))
        labels[target] = {"count": len(numbers), "mean": fmean(numbers)} if numbers else counts
    return {
        "name": split,
        "digest": fingerprint,
        "source": ", ".join(paths) or "phantom cohort",
        "profile": {
            "split": split,
            "conversations": len({c.conversation_id for c in conversations}),
            "subjects": len({c.subject_id for c in conversations}),
            "labels": labels,
        },
    }


def to_dataset_input(description: Mapping[str, Any]) -> DatasetInput:
    """Convert the result of ``describe_dataset`` to MLflow's type."""
    dataset = Dataset(
        name=description["name"],
        digest=description["digest"],
        source_type="local",
        source=json.dumps({"uri": description["source"]}),
        profile=json.dumps(description["profile"]),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", description["name"])])


@cache
def environment_json() -> str:
    """Describe packages and hardware of this process as JSON.

    Cached, because reading the installed packages takes a quarter of a second.
    """
    import torch

    packages = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"]}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    environment = {
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
    return json.dumps(environment, indent=1)


def code_version() -> dict[str, str]:
    """Return the git commit of this code and whether files were changed; outside a checkout, UMBRELLA_COMMIT."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails if the checkout is of another project
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "git.dirty": str(bool(git("status", "--porcelain"))),
        }
    commit = os.environ.get("UMBRELLA_COMMIT")
    return {"mlflow.source.git.commit": commit} if commit else {}


def read_salt(storage: str | Path) -> str:
    """Read the salt of a storage folder; create it if there is none.

    Only the owner can read the file: a subject's hash can be computed from its id and the salt.
    """
    path = Path(storage) / SALT
    if not path.exists():
        with NamedTemporaryFile("w", dir=path.parent) as file, suppress(FileExistsError):  # of another process
            file.write(secrets.token_hex(32))
            file.flush()
            os.link(file.name, path)
    return path.read_text()


def hash_subject(subject: str, salt: str) -> str:
    """Hash a subject id: the first 64 bits of its HMAC-SHA256 with the salt as key."""
    return "subject-" + hmac.new(salt.encode(), subject.encode(), hashlib.sha256).hexdigest()[:16]


def redact_subjects(text: str, subjects: Iterable[str], salt: str) -> str:
    """Replace the ids of these subjects by their hashes, where they are whole words in a text."""
    ids = sorted(filter(None, set(subjects)), key=len, reverse=True)
    if not ids:
        return text
    words = "|".join(map(re.escape, ids))
    return re.sub(rf"(?<![0-9A-Za-z])(?:{words})(?![0-9A-Za-z])", lambda found: hash_subject(found[0], salt), text)
