"""The training task of the baseline: an SFCN (a 3D CNN) that predicts one target from one volume."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import ray
import torch
from torch import distributed, nn
from torch.nn import functional

from umbrella.baseline.targets import BaselineJob, Sample
from umbrella.data.masking import Redact
from umbrella.data.pipeline import batches, slices
from umbrella.evaluation.metrics import validation_metrics
from umbrella.evaluation.predictions import Prediction, mean_over_subjects, write_predictions
from umbrella.paths import PREDICTIONS
from umbrella.training.augmentation import augment_volumes
from umbrella.training.distributed import all_gather_object, autocast, parallelise, raise_on_all_ranks
from umbrella.training.optimizer import main_lr
from umbrella.training.task import Summary, Task
from umbrella.volumes.store import open_store

WEIGHTS = "weights.pt"


@dataclass(frozen=True)
class VolumeBatch:
    """A batch of N volumes with their encoded labels."""

    voxels: torch.Tensor
    """(N, frames, X, Y, Z), float16. A single volume has one frame."""
    targets: torch.Tensor
    """(N, num_outputs), float32: the distribution that encodes each label."""
    sample_indices: torch.Tensor
    """(N,), int64: indices into the training samples."""
    task_ids: Sequence[str]
    """N subject identifiers."""
    rng_keys: Sequence[tuple[int, ...]]
    """(seed, epoch, sample) of each volume, the key of its random augmentation."""

    def apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "VolumeBatch":
        """Return the batch with every tensor changed."""
        voxels, targets, sample_indices = map(change, (self.voxels, self.targets, self.sample_indices))
        return replace(self, voxels=voxels, targets=targets, sample_indices=sample_indices)


class BaselineTask(Task):
    """The task of one ``BaselineJob``. The interface is documented in ``Task``."""

    def __init__(self, job: BaselineJob, rank: int, world_size: int, device: torch.device) -> None:
        self.job, self.settings = job, job.settings
        self.rank, self.world_size, self.device = rank, world_size, device
        torch.backends.cudnn.deterministic = True
        baseline = self.settings.baseline
        self.dtype = getattr(torch, baseline.dtype)
        self.store = open_store(self.settings)
        self.samples, self.validation, self.evaluation = ray.get([job.samples, job.validation, job.evaluation])
        modality = self.store.modalities[baseline.modality]
        self.is_series = modality.is_series
        self.shape = (modality.grid[3] if self.is_series else 1, *modality.grid[:3])
        self.net = Sfcn(self.shape[1:], baseline.channels, job.encoding.num_outputs, baseline.dropout, self.shape[0])
        self.parallel = parallelise(self.net, device, world_size)
        optim = self.settings.optim
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=optim.lr, momentum=baseline.momentum, weight_decay=optim.weight_decay
        )

    def load(self, made: tuple[np.ndarray, Sequence[tuple[int, ...]]]) -> VolumeBatch:
        """See ``Task.load``. It does all work, because there is no text."""
        indices, rng_keys = made
        samples = [self.samples[int(i)] for i in indices]
        targets = torch.tensor(np.stack([self.job.encoding.encode(sample.label) for sample, _ in samples])).float()
        voxels = self._read_volumes([path for _, path in samples], rng_keys)
        return VolumeBatch(voxels, targets, torch.tensor(indices), [s.subject_id for s, _ in samples], rng_keys)

    def augment(self, batch: VolumeBatch) -> VolumeBatch:
        """See ``Task.augment``."""
        return replace(batch, voxels=augment_volumes(batch.voxels.float(), batch.rng_keys, self.settings.train.augment))

    def step(self, batches: Sequence[VolumeBatch], schedule: torch.optim.lr_scheduler.LRScheduler) -> dict[str, float]:
        """See ``Task.step``. The loss is the KL divergence, averaged over the volumes of all ranks."""
        (batch,) = batches
        self.parallel.train()
        loss = functional.kl_div(self._forward(self.parallel, batch.voxels), batch.targets, reduction="batchmean")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.optim.clip)
        total = loss.detach() / self.world_size
        if self.world_size > 1:
            distributed.all_reduce(total)
        values = {"train/loss": float(total), "train/lr": main_lr(self.optimizer), "train/grad_norm": float(norm)}
        if not (isfinite(values["train/loss"]) and isfinite(values["train/grad_norm"])):  # equal on all ranks
            raise FloatingPointError(
                f"the loss is {values['train/loss']:.4g} and the norm of its gradient {values['train/grad_norm']:.4g};"
                " lower baseline.lr"
            )
        self.optimizer.step()
        schedule.step()
        self.optimizer.zero_grad()
        return values

    def _forward(self, model: torch.nn.Module, voxels: torch.Tensor) -> torch.Tensor:
        with autocast(model, self.device, self.dtype):
            return model(voxels)

    def evaluate(self) -> dict[str, float]:
        """See ``Task.evaluate``. Adds ``eval/<target>/mae`` over subjects for a numeric target."""
        self.predictions = self._predict(self.validation, "validation")
        metrics = validation_metrics(self.predictions)
        if not self.job.encoding.classes:
            subjects = mean_over_subjects(self.predictions)
            errors = [abs(float(subject.predicted or 0) - float(subject.label or 0)) for subject in subjects]
            metrics[f"eval/{self.job.target}/mae"] = fmean(errors)
        return metrics

    @torch.no_grad()
    def _predict(self, samples: Sequence[Sample], split: str) -> list[Prediction]:
        """Predict all samples. Collective: each rank computes a share of the distinct volumes; all ranks return all."""
        if self.world_size > 1:  # batch-norm statistics differ between ranks
            for buffer in self.net.buffers():
                distributed.broadcast(buffer, 0)
        self.net.eval()
        paths = list(dict.fromkeys(path for _, path in samples))
        size = self.settings.train.evaluation_batch_size
        own = paths[self.rank :: self.world_size]

        def make(start: int, stop: int) -> tuple[list[str], torch.Tensor]:
            return own[start:stop], self._read_volumes(own[start:stop], None)

        local: dict[str, np.ndarray] = {}
        for batch_paths, voxels in batches(slices(len(own), size), make, name=split):
            log_probabilities = self._forward(self.net, voxels.to(self.device).float())
            local |= dict(zip(batch_paths, log_probabilities.double().exp().cpu().numpy(), strict=True))
        outputs = {path: output for of_rank in all_gather_object(local) for path, output in of_rank.items()}
        predictions, encoding = [], self.job.encoding
        for prediction, path in samples:
            output, target = outputs[path], encoding.encode(prediction.label)
            used = target > 0  # the loss is the KL divergence
            loss = float(np.sum(target[used] * np.log(target[used] / output[used].clip(1e-30))))
            decoded = encoding.decode(output.tolist())
            answer: dict[str, Any] = {"probabilities" if encoding.classes else "predicted": decoded}
            predictions.append(replace(prediction, answer_nll=loss, answer_tokens=1, **answer))
        return predictions

    def _read_volumes(self, paths: Sequence[str], rng_keys: Sequence[tuple[int, ...]] | None) -> torch.Tensor:
        """Read N volumes, (N, frames, X, Y, Z), float16. Without ``rng_keys``, the middle window of each series."""
        volumes = torch.empty((len(paths), *self.shape), dtype=torch.float16, pin_memory=self.device.type == "cuda")
        for i, (path, frames) in enumerate(zip(paths, volumes.numpy(), strict=True)):
            rng_key = (*rng_keys[i], 0) if rng_keys else None
            self.store.read(path, self.settings.baseline.modality, frames if self.is_series else frames[0], rng_key)
        return volumes

    def weights(self) -> dict[str, torch.Tensor]:
        """See ``Task.weights``. Includes the running statistics of batch normalisation."""
        return self.net.state_dict()

    def save_weights(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """See ``Task.save_weights``."""
        with (folder / WEIGHTS).open("wb") as file:  # with a path, torch hides the error of the system
            torch.save(dict(weights), file)

    def load_weights(self, folder: Path) -> None:
        """See ``Task.load_weights``."""
        self.net.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True, map_location=self.device))

    def summary(self, redact: Redact) -> Summary:
        """See ``Task.summary``."""
        size = sum(weight.numel() for weight in self.net.parameters())
        text = f"SFCN, {size} parameters, {self.net.blocks} blocks, for {self.job.target}"
        return Summary(text, {"baseline": "SFCN", "baseline.parameters": str(size)})

    def finish(self, best: Path | None) -> None:
        """Predict ``evaluate.split`` with the best checkpoint and write the predictions."""
        if best:
            self.load_weights(best)
        predictions = self._predict(self.evaluation, self.settings.evaluate.split)
        with raise_on_all_ranks():
            if self.rank == 0:
                write_predictions(Path(self.job.folder) / PREDICTIONS, predictions)


class Sfcn(nn.Module):
    """SFCN, the simple fully convolutional network of Peng et al. (2021).

    Each block of 3x3x3 convolutions halves the grid. A block of 1x1x1 convolutions, the mean over the grid and a linear
    layer follow.

    Args:
        grid: (X, Y, Z) in voxels. It limits the number of halving blocks: the shortest axis keeps 2 voxels.
        channels: output channels of each halving block, then of the 1x1x1 block. A small grid uses only the first
            ones and the last.
        outputs: number of outputs per volume.
        dropout: dropout probability before the linear layer.
        inputs: input channels: 1, or the number of frames of a series.
    """

    def __init__(
        self, grid: Sequence[int], channels: Sequence[int], outputs: int, dropout: float = 0.5, inputs: int = 1
    ) -> None:
        super().__init__()
        halving = channels[: min(len(channels) - 1, max(0, min(grid).bit_length() - 2))]
        self.blocks = len(halving)
        layers: list[nn.Module] = []
        for before, after in zip([inputs, *halving], halving, strict=False):
            layers += [nn.Conv3d(before, after, 3, padding=1), nn.BatchNorm3d(after), nn.MaxPool3d(2), nn.ReLU()]
        last = channels[-1]
        layers += [nn.Conv3d([inputs, *halving][-1], last, 1), nn.BatchNorm3d(last), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(last, outputs)  # equal to a 1x1x1 convolution of the mean

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Return log probabilities (n, outputs), float32, of volumes (n, inputs, X, Y, Z)."""
        pooled = self.features(volumes).mean((2, 3, 4))
        return self.head(self.dropout(pooled)).float().log_softmax(1)
