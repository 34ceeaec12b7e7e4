"""Optimizer steps for tests, in this process or in several that train together."""

import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from umbrella.data.batching import Batch
from umbrella.models.build import component_parameters
from umbrella.models.partial_checkpoint import load_saved_weights
from umbrella.training.distributed import copy_into_shard, restore_training_state
from umbrella.training.optimizer import build_optimizer, build_schedule
from umbrella.training.settings import OptimSettings
from umbrella.training.step import train_step

# Each process starts as a copy of one with these imports. A fresh one would take six seconds for them.
multiprocessing.set_forkserver_preload(["umbrella.training.language_model", "torch.distributed.fsdp", "peft"])

OPTIM = OptimSettings(lr=1e-2, warmup=2)
CPU = torch.device("cpu")
Make = Callable[..., Any]
"""Type of a fixture that makes something."""


class Training:
    """A model with its optimizer and schedule. ``options`` are those of ``train_step``."""

    def __init__(self, model: Any, optim: OptimSettings = OPTIM, parallel: Any = None, **options: Any) -> None:
        self.model, self.parallel, self.options = model, parallel or model, {"clip": 1.0, **options}
        self.optimizer = build_optimizer(model, optim)
        self.schedule = build_schedule(self.optimizer, optim, 6)

    def step(self, *batches: Batch) -> dict[str, float]:
        parts = component_parameters(self.model)
        return train_step(self.parallel, batches, self.optimizer, self.schedule, parts=parts, **self.options)

    def losses(self, batches: Sequence[Batch]) -> list[float]:
        """Those of one step with each batch."""
        return [self.step(batch)["train/loss"] for batch in batches]

    def restore(self, checkpoint: Path, names: Sequence[str]) -> None:
        """Restore a checkpoint that has at least the weights of these names."""
        load_saved_weights(checkpoint, self.model, names, copy_into_shard)
        restore_training_state(checkpoint, self.optimizer, self.schedule)


def measure(
    model: Any, *batches: Batch, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The metrics of a step with a learning rate of 0, and its gradient by weight."""
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = torch.optim.SGD([w for w in inner.parameters() if w.requires_grad], lr=0.0)
    seen: dict[str, torch.Tensor] = {}

    def look(*unused: Any) -> None:
        seen.update({name: w.grad.clone().cpu() for name, w in inner.named_parameters() if w.grad is not None})

    optimizer.register_step_pre_hook(look)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return train_step(model, batches, optimizer, schedule, 1e9, component_parameters(inner), dtype), seen


def join_group(rank: int, workers: int, folder: Path, device: torch.device = CPU) -> None:
    """Join the process group of so many workers."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # A worker that waits for what another does not send would wait for ever.
    distributed.init_process_group(
        "gloo" if device == CPU else "nccl",
        f"file://{folder / f'group of {workers}'}",
        timedelta(minutes=10),
        rank=rank,
        world_size=workers,
    )


def run_workers(work: Callable[..., None], arguments: tuple[Any, ...], count: int, start: str = "forkserver") -> None:
    """Call ``work(rank, *arguments)`` in so many processes at once; raises what one of them raises."""
    # As bytes: torch would pass an open file for each tensor, which are too many here.
    start_processes(_run, (work, pickle.dumps(arguments)), nprocs=count, start_method=start)


def _run(rank: int, work: Callable[..., None], arguments: bytes) -> None:
    work(rank, *pickle.loads(arguments))
