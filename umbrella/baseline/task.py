"""The task of training the baseline: one 3D CNN for one target, with the trainer of the language model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from statistics import fmean

import numpy as np
import ray
import torch
from torch import distributed, nn
from torch.nn import functional

from umbrella.baseline.job import BaselineJob, Question
from umbrella.baseline.targets import Bins, Sample
from umbrella.data.ingest import open_store
from umbrella.data.mask_audit import Hide
from umbrella.data.pipeline import Plan, Rows, batches, evaluation_rows
from umbrella.evaluation.metrics import summarise
from umbrella.evaluation.predictions import Answer, Prediction, mean_number, write_predictions
from umbrella.paths import PREDICTIONS
from umbrella.training.augmentation import augment_volumes
from umbrella.training.checkpoint import copy_to_host
from umbrella.training.distributed import all_gather_object, autocast, data_parallel, raise_on_all_ranks
from umbrella.training.optimizer import main_lr
from umbrella.training.task import Summary, Task

WEIGHTS = "weights.pt"


@dataclass(frozen=True)
class Volumes:
    """N volumes. voxels: (N, frames, X, Y, Z), float16. soft: (N, outputs), the distributions of their labels."""

    voxels: torch.Tensor
    soft: torch.Tensor
    sample_indices: torch.Tensor
    task_ids: Sequence[str]
    """Subjects."""
    draws: Sequence[tuple[int, ...]]

    def apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Volumes":
        """Return the batch with every tensor changed."""
        indices = change(self.sample_indices)
        return replace(self, voxels=change(self.voxels), soft=change(self.soft), sample_indices=indices)


class BaselineTask(Task):
    """See ``Task``."""

    def __init__(self, job: BaselineJob, rank: int, world_size: int, device: torch.device) -> None:
        self.job, self.settings = job, job.settings
        self.rank, self.world_size, self.device = rank, world_size, device
        torch.backends.cudnn.deterministic = True
        own = self.settings.baseline
        self.dtype = getattr(torch, own.dtype)
        self.store = open_store(self.settings)
        self.samples: Sequence[Sample]
        self.samples, self.validation, self.asked = ray.get([job.samples, job.validation, job.asked])
        modality = self.store.modalities[own.modality]
        self.is_series = modality.is_series
        self.shape = (modality.grid[3] if self.is_series else 1, *modality.grid[:3])
        self.net = Sfcn(self.shape[1:], own.channels, job.head.size, own.dropout, self.shape[0])
        self.parallel = data_parallel(self.net, device, world_size)
        optim = self.settings.optim
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=optim.lr, momentum=own.momentum, weight_decay=optim.weight_decay
        )

    def plan(self, world_size: int, sorted_by: int) -> Plan:
        """See ``Task.plan``. Samples are not sorted."""
        train = self.settings.train
        return Plan(len(self.samples), self.settings.seed, train.epochs, world_size, train.batch_size, 1)

    def batch(self, rows: Rows, draws: Sequence[tuple[int, ...]]) -> Volumes:
        """See ``Task.batch``."""
        samples = [self.samples[int(i)] for i in rows["sample"]]
        soft = torch.tensor(np.stack([self.job.head.soft(sample.label) for sample in samples]))
        voxels = self._read([sample.path for sample in samples], draws)
        return Volumes(voxels, soft.float(), torch.tensor(rows["sample"]), [s.subject_id for s in samples], draws)

    def augment(self, batch: Volumes) -> Volumes:
        """See ``Task.augment``."""
        frames = augment_volumes(batch.voxels.float(), batch.draws, self.settings.train.augment)
        return replace(batch, voxels=frames)

    def step(self, batches: Sequence[Volumes], schedule: torch.optim.lr_scheduler.LRScheduler) -> dict[str, float]:
        """See ``Task.step``. The loss is the mean over the volumes of all ranks."""
        (batch,) = batches
        self.parallel.train()
        loss = functional.kl_div(self._forward(self.parallel, batch.voxels), batch.soft, reduction="batchmean")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.optim.clip)
        total = loss.detach() / self.world_size
        if self.world_size > 1:
            distributed.all_reduce(total)
        values = {"train/loss": float(total), "train/lr": main_lr(self.optimizer), "train/grad_norm": float(norm)}
        if not (isfinite(values["train/loss"]) and isfinite(values["train/grad_norm"])):  # on every rank alike
            what = f"the loss is {values['train/loss']:.4g} and the norm of its gradient"
            raise FloatingPointError(f"{what} {values['train/grad_norm']:.4g}; lower baseline.lr")
        self.optimizer.step()
        schedule.step()
        self.optimizer.zero_grad()
        return values

    def _forward(self, model: torch.nn.Module, frames: torch.Tensor) -> torch.Tensor:
        with autocast(model, self.device, self.dtype):
            return model(frames)

    def evaluate(self) -> dict[str, float]:
        """See ``Task.evaluate``; also ``eval/<target>/mae`` over subjects, for a number."""
        self.predictions = self._answer(self.validation)
        measured = summarise(self.predictions)
        if isinstance(self.job.head, Bins):
            answers = (Answer(a.subject_id, float(a.label or 0), a.said) for a in self.predictions)
            errors = [abs(float(subject.said or 0) - float(subject.truth)) for subject in mean_number(answers)]
            measured[f"eval/{self.job.target}/mae"] = fmean(errors)
        return measured

    @torch.no_grad()
    def _answer(self, questions: Sequence[Question]) -> list[Prediction]:
        """Answer the questions on every rank: each looks at its share of the volumes, and at each of them once."""
        if self.world_size > 1:  # each has its own running means of the last step
            for buffer in self.net.buffers():
                distributed.broadcast(buffer, 0)
        self.net.eval()
        paths = list(dict.fromkeys(path for _, path in questions))
        own: dict[str, np.ndarray] = {}
        size = self.settings.train.evaluation_batch_size
        rows = evaluation_rows(np.zeros(len(paths)), self.rank, self.world_size, size)

        def make(rows: Rows) -> tuple[list[str], torch.Tensor]:
            here = [paths[int(i)] for i in rows["sample"]]
            return here, self._read(here, None)

        for here, voxels in batches(rows, size, 1, make):
            logs = self._forward(self.net, voxels.to(self.device).float())
            own |= dict(zip(here, logs.double().exp().cpu().numpy(), strict=True))
        everyones = {path: said for part in all_gather_object(own) for path, said in part.items()}
        return [self._filled(row, everyones[path]) for row, path in questions]

    def _filled(self, row: Prediction, probabilities: np.ndarray) -> Prediction:
        head = self.job.head
        assert row.label is not None
        soft = head.soft(row.label)
        divergence = float(np.sum(soft[soft > 0] * np.log(soft[soft > 0] / probabilities[soft > 0].clip(1e-30))))
        row = replace(row, answer_nll=divergence, answer_tokens=1)
        said = head.read(probabilities.tolist())
        return replace(row, probabilities=said) if isinstance(said, dict) else replace(row, said=said)

    def _read(self, paths: Sequence[str], draws: Sequence[tuple[int, ...]] | None) -> torch.Tensor:
        pin = self.device.type == "cuda"
        stack = torch.empty((len(paths), *self.shape), dtype=torch.float16, pin_memory=pin)
        for i, (path, into) in enumerate(zip(paths, stack.numpy(), strict=True)):
            draw = (*draws[i], 0) if draws else None
            self.store.read(path, self.settings.baseline.modality, into if self.is_series else into[0], draw)
        return stack

    def weights(self, keep: bool) -> dict[str, torch.Tensor]:
        """See ``Task.weights``. With the running means of the normalisation."""
        return copy_to_host(self.net.state_dict(), keep)

    def save_weights(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """See ``Task.save_weights``."""
        with (folder / WEIGHTS).open("wb") as file:  # given a path, torch hides what the system says
            torch.save(dict(weights), file)

    def load_weights(self, folder: Path) -> None:
        """See ``Task.load_weights``."""
        self.net.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True, map_location=self.device))

    def summary(self, hide: Hide) -> Summary:
        """The network and its size."""
        size = sum(weight.numel() for weight in self.net.parameters())
        text = f"SFCN, {size} parameters, {self.net.blocks} blocks, for {self.job.target}"
        return Summary(text, {"baseline": "SFCN", "baseline.parameters": str(size)})

    def finish(self, best: Path | None) -> None:
        """Let the best checkpoint answer what is asked at the end."""
        if best:
            self.load_weights(best)
        predictions = self._answer(self.asked)
        with raise_on_all_ranks():
            if self.rank == 0:
                write_predictions(Path(self.job.folder) / PREDICTIONS, predictions)


class Sfcn(nn.Module):
    """Blocks that halve the grid, one of 1x1x1 kernels, the mean over what is left of the grid, and a linear map.

    Args:
        grid: (X, Y, Z); how many blocks there are follows from it, see ``blocks_of``.
        channels: after each halving block, and after the one of 1x1x1 kernels. Of more than the grid has room for, the
            first ones and the last.
        outputs: numbers per volume.
        inputs: channels of a volume: 1, or the frames of a series.
    """

    def __init__(
        self, grid: Sequence[int], channels: Sequence[int], outputs: int, dropout: float = 0.5, inputs: int = 1
    ) -> None:
        super().__init__()
        halving = channels[: blocks_of(grid, channels)]
        self.blocks = len(halving)
        layers: list[nn.Module] = []
        for before, after in zip([inputs, *halving], halving, strict=False):
            layers += [nn.Conv3d(before, after, 3, padding=1), nn.BatchNorm3d(after), nn.MaxPool3d(2), nn.ReLU()]
        last = channels[-1]
        layers += [nn.Conv3d([inputs, *halving][-1], last, 1), nn.BatchNorm3d(last), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(last, outputs)  # a 1x1x1 kernel on a grid of one voxel

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Volumes (n, inputs, X, Y, Z) to log probabilities (n, outputs), float32."""
        pooled = self.features(volumes).mean((2, 3, 4))
        return self.head(self.dropout(pooled)).float().log_softmax(1)


def blocks_of(grid: Sequence[int], channels: Sequence[int]) -> int:
    """Blocks that halve a grid (X, Y, Z): as many as there are channels for, while its shortest axis keeps 2 voxels."""
    return min(len(channels) - 1, max(0, min(grid).bit_length() - 2))
