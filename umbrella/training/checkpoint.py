"""A checkpoint folder: the model as transformers saves it, the optimizer's state, and how far the training is."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROGRESS, OPTIMIZER, SETTINGS = "progress.json", "optimizer.pt", "settings.yaml"


@dataclass(frozen=True)
class Progress:
    """How far a training is: optimizer steps done, and the position of the next sample (see ``data.pipeline.Plan``)."""

    step: int = 0
    position: int = 0


def save_checkpoint(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    progress: Progress,
    settings_yaml: str,
) -> None:
    """Write everything that resuming, scoring and generating need."""
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, folder / OPTIMIZER)
    (folder / SETTINGS).write_text(settings_yaml, encoding="utf-8")
    (folder / PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")


def read_progress(folder: str | Path) -> Progress:
    """How far the training of a checkpoint is."""
    return Progress(**json.loads((Path(folder) / PROGRESS).read_text(encoding="utf-8")))


def restore(
    folder: str | Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> Progress:
    """Put a checkpoint's weights and states in place."""
    folder = Path(folder)
    loaded = type(model).from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    state = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return read_progress(folder)
