"""Full and partial checkpoints. A partial checkpoint has the trained weights and a reference to its base checkpoint."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import cached_file

from umbrella.base import UserError
from umbrella.models.settings import ModelSettings
from umbrella.models.umbrella_llava import ADAPTER, BASE, UmbrellaForConditionalGeneration

FULL_WEIGHTS, TRAINED_WEIGHTS = "model.safetensors", "trained.safetensors"
ADAPTER_WEIGHTS = f"{ADAPTER}/adapter_model.safetensors"
NUM_BLOCKS, BLOCK_SIZE = 16, 1 << 16
"""Number and size in bytes of the blocks of a file that are hashed: 1 MiB per file."""


def is_partial(folder: str | Path) -> bool:
    """Return whether a folder holds a partial checkpoint."""
    return (Path(folder) / BASE).is_file()


def read_base(folder: str | Path) -> dict[str, Any]:
    """Return the content of ``base.json`` of a partial checkpoint, see ``base_description``."""
    return json.loads((Path(folder) / BASE).read_text("utf-8"))


def saves_full_model(settings: ModelSettings) -> bool:
    """Return whether a training saves full checkpoints: it has no base checkpoint, or trains all weights."""
    return not settings.checkpoint or settings.train == "all"


def parameters_to_save(model: UmbrellaForConditionalGeneration, settings: ModelSettings) -> list[str]:
    """Return the names of the parameters in a training's checkpoints.

    A partial checkpoint has the trainable parameters and those that its base lacks: the volume embedder, the adapters,
    and the weights that an earlier partial checkpoint has.
    """
    parameters = dict(model.named_parameters())
    if saves_full_model(settings):
        return list(parameters)
    trained_before: set[str] = set()
    if is_partial(settings.checkpoint):
        with safe_open(Path(settings.checkpoint) / TRAINED_WEIGHTS, "pt") as file:
            trained_before = set(file.keys())
    embedder = set(model.embedder.parameters())
    return [
        name
        for name, weight in parameters.items()
        if weight.requires_grad or weight in embedder or ".lora_" in name or _stored_name(name) in trained_before
    ]


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor], full: bool) -> None:
    """Write the weights of a full or partial checkpoint, given by parameter name.

    Adapter weights go to ``adapter/``, in the format of PEFT.
    """
    model_weights = {_stored_name(name): weight for name, weight in weights.items() if ".lora_" not in name}
    adapter_weights = {_stored_name(name): weight for name, weight in weights.items() if ".lora_" in name}
    save_file(model_weights, folder / (FULL_WEIGHTS if full else TRAINED_WEIGHTS), {"format": "pt"})
    if adapter_weights:
        (folder / ADAPTER).mkdir(exist_ok=True)
        save_file(adapter_weights, folder / ADAPTER_WEIGHTS, {"format": "pt"})


@torch.no_grad()
def _copy_promoting(weight: torch.Tensor, stored: torch.Tensor) -> None:
    # Trained weights are float32. The base may have a smaller dtype.
    dtype = torch.promote_types(weight.dtype, stored.dtype)
    if dtype != weight.dtype:
        weight.data = weight.data.to(dtype)
    weight.copy_(stored)


def load_saved_weights(
    folder: str | Path,
    model: nn.Module,
    names: Sequence[str] = (),
    copy: Callable[[torch.Tensor, torch.Tensor], None] = _copy_promoting,
) -> None:
    """Load the weights of a full or partial checkpoint into a model, one tensor at a time to save memory.

    Args:
        folder: the checkpoint.
        model: the model, changed in place.
        names: parameters that the checkpoint must have.
        copy: called with a parameter and its stored value; copies the value to the parameter.

    Raises:
        UserError: if a required parameter is missing, or a stored one is unknown or has another shape.
    """
    folder = Path(folder)
    parameters = {_stored_name(name): weight for name, weight in model.named_parameters()}
    missing = {_stored_name(name) for name in names}
    files = [folder / (TRAINED_WEIGHTS if is_partial(folder) else FULL_WEIGHTS), folder / ADAPTER_WEIGHTS]
    for path in files if files[1].exists() else files[:1]:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                stored = file.get_tensor(name)
                if name not in parameters or parameters[name].shape != stored.shape:
                    has = f"one of shape {tuple(parameters[name].shape)}" if name in parameters else "none"
                    raise UserError(
                        f"{path}: does not fit: {name} is of shape {tuple(stored.shape)}, the model has {has}"
                    )
                copy(parameters[name], stored)
                missing.discard(name)
    if missing:
        raise UserError(f"{folder}: does not fit: it lacks {len(missing)} weights, {min(missing)} among them")


def _stored_name(name: str) -> str:
    """Return the name of a parameter in a file: without PEFT's wrappers, and in PEFT's format for adapter weights."""
    if ".lora_" in name:
        return f"base_model.model.{name.replace('.default.', '.')}"
    return name.replace(".base_layer.", ".")


def base_description(checkpoint: str) -> str:
    """Return the content of ``base.json``: the base checkpoint, and size and hash of its weight files."""
    base = read_base(checkpoint)["checkpoint"] if is_partial(checkpoint) else checkpoint
    return json.dumps({"checkpoint": base, "files": _fingerprint(base)}, indent=1)


def check_base(folder: str | Path) -> None:
    """Check that the base of a partial checkpoint is unchanged. For a name on the Hub, check only cached files.

    Raises:
        UserError: if a file of the base is missing or has changed.
    """
    base = read_base(folder)
    checkpoint, current = base["checkpoint"], _fingerprint(base["checkpoint"])
    for name, expected in base["files"].items():
        if name in current and current[name] == expected:
            continue
        if name in current or _is_local(checkpoint):
            what = "has changed" if name in current else "is gone"
            raise UserError(
                f"{folder}: is a partial checkpoint of {checkpoint}, and {name} there {what}; put it back (a link will"
                " do)"
            )


def _is_local(checkpoint: str) -> bool:
    return Path(checkpoint).is_absolute() or Path(checkpoint).is_dir()


def _fingerprint(checkpoint: str) -> dict[str, dict[str, int | str]]:
    """Return size and hash of some blocks of each local weight file of a checkpoint, by file name."""
    folder = Path(checkpoint)
    if not _is_local(checkpoint):
        try:
            folder = Path(str(cached_file(checkpoint, "config.json"))).parent
        except (OSError, ValueError):  # loading the model raises the error
            return {}
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        size, digest = path.stat().st_size, hashlib.sha256()
        with path.open("rb") as file:
            for i in range(NUM_BLOCKS):
                file.seek(max(0, size - BLOCK_SIZE) * i // (NUM_BLOCKS - 1))
                digest.update(file.read(BLOCK_SIZE))
        files[path.name] = {"bytes": size, "sample": digest.hexdigest()[:32]}
    return files
