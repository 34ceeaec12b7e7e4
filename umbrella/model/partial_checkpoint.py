"""Weights in a folder: all of a model, or what a training moved and the base that the rest is taken from."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import cached_file

from umbrella.base import UserError
from umbrella.model.settings import ModelSettings
from umbrella.model.umbrella_llava import ADAPTER, BASE, UmbrellaForConditionalGeneration

WHOLE, TRAINED = "model.safetensors", "trained.safetensors"
ADAPTERS = f"{ADAPTER}/adapter_model.safetensors"
SAMPLES, SAMPLE = 16, 1 << 16
"""How many pieces of a file, of how many bytes, are hashed: 1 MB of each file, whatever its size."""


def is_partial(folder: str | Path) -> bool:
    """Whether a folder holds what a training moved, and not the whole model."""
    return (Path(folder) / BASE).is_file()


def base_checkpoint(checkpoint: str) -> str:
    """The checkpoint that holds the weights which a training from this one does not move: itself, if it is whole."""
    return (
        json.loads((Path(checkpoint) / BASE).read_text("utf-8"))["checkpoint"] if is_partial(checkpoint) else checkpoint
    )


def saves_full_model(settings: ModelSettings) -> bool:
    """Whether a training's checkpoints hold the whole model: there is no base, or everything moves."""
    return not settings.checkpoint or settings.train == "all"


def parameters_to_save(model: UmbrellaForConditionalGeneration, settings: ModelSettings) -> list[str]:
    """The parameters that a training's checkpoints hold: all, or those that move and those that its base has not.

    The base has no volume embedder of these modalities, no adapters, and nothing of what an earlier training moved.
    """
    named = dict(model.named_parameters())
    if saves_full_model(settings):
        return list(named)
    earlier: set[str] = set()
    if is_partial(settings.checkpoint):
        with safe_open(Path(settings.checkpoint) / TRAINED, "pt") as file:
            earlier = set(file.keys())
    embedder = set(model.embedder.parameters())
    return [
        name
        for name, weight in named.items()
        if weight.requires_grad or weight in embedder or ".lora_" in name or _stored_name(name) in earlier
    ]


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor], whole: bool) -> None:
    """Write weights, by the names of the model's parameters: those of adapters to ``adapter/``, as PEFT does."""
    own = {_stored_name(name): weight for name, weight in weights.items() if ".lora_" not in name}
    adapters = {_stored_name(name): weight for name, weight in weights.items() if ".lora_" in name}
    save_file(own, folder / (WHOLE if whole else TRAINED), {"format": "pt"})
    if adapters:
        (folder / ADAPTER).mkdir(exist_ok=True)
        save_file(adapters, folder / ADAPTERS, {"format": "pt"})


@torch.no_grad()
def _put(weight: torch.Tensor, stored: torch.Tensor) -> None:
    # What was trained has float32, where the base that it is laid over may have less.
    kind = torch.promote_types(weight.dtype, stored.dtype)
    if kind != weight.dtype:
        weight.data = weight.data.to(kind)
    weight.copy_(stored)


def load_saved_weights(
    folder: str | Path,
    model: nn.Module,
    names: Sequence[str] = (),
    put: Callable[[torch.Tensor, torch.Tensor], None] = _put,
) -> None:
    """Put the weights that a folder holds into a model, one after the other: there is never a second model.

    Args:
        names: parameters that must be there.
        put: copies the second into the first.

    Raises:
        UserError: they are not, or the model has no such weight, or one of another shape.
    """
    folder = Path(folder)
    weights = {_stored_name(name): weight for name, weight in model.named_parameters()}
    wanted = {_stored_name(name) for name in names}
    files = [folder / (TRAINED if is_partial(folder) else WHOLE), folder / ADAPTERS]
    for path in files if files[1].exists() else files[:1]:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                stored = file.get_tensor(name)
                if name not in weights or weights[name].shape != stored.shape:
                    has = f"one of shape {tuple(weights[name].shape)}" if name in weights else "none"
                    raise UserError(
                        f"{path}: does not fit: {name} is of shape {tuple(stored.shape)}, the model has {has}"
                    )
                put(weights[name], stored)
                wanted.discard(name)
    if wanted:
        raise UserError(f"{folder}: does not fit: it lacks {len(wanted)} weights, {min(wanted)} among them")


def _stored_name(name: str) -> str:
    """A parameter's name in a file: as if there were no adapters, and those by PEFT's names."""
    if ".lora_" in name:
        return f"base_model.model.{name.replace('.default.', '.')}"
    return name.replace(".base_layer.", ".")


def base_description(checkpoint: str) -> str:
    """The content of ``base.json``: which checkpoint, and what its weights look like."""
    base = base_checkpoint(checkpoint)
    return json.dumps({"checkpoint": base, "files": _fingerprint(base)}, indent=1)


def check_base(folder: str | Path) -> None:
    """See that the base that a folder's weights stand on is what it was. Of a name on a hub, only what is here already.

    Raises:
        UserError: it is gone, or another one.
    """
    base = json.loads((Path(folder) / BASE).read_text("utf-8"))
    checkpoint, there = base["checkpoint"], _fingerprint(base["checkpoint"])
    for name, was in base["files"].items():
        if name in there and there[name] == was:
            continue
        if name in there or _is_local(checkpoint):
            what = "is not what it was" if name in there else "is gone"
            raise UserError(
                f"{folder}: holds what was trained on {checkpoint}, and {name} there {what}; put it back (a link will"
                " do)"
            )


def _is_local(checkpoint: str) -> bool:
    return Path(checkpoint).is_absolute() or Path(checkpoint).is_dir()


def _fingerprint(checkpoint: str) -> dict[str, dict[str, int | str]]:
    """Size and hash of a little of each file of weights that lies here."""
    folder = Path(checkpoint)
    if not _is_local(checkpoint):
        try:
            folder = Path(str(cached_file(checkpoint, "config.json"))).parent
        except (OSError, ValueError):  # who loads it says more
            return {}
    return {path.name: _looks(path) for path in sorted(folder.glob("*.safetensors"))}


def _looks(path: Path) -> dict[str, int | str]:
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return {"bytes": size, "sample": digest.hexdigest()[:32]}
