"""Examples to a batch: padding, loss weights, volumes gathered by modality."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from umbrella.data.masking import loss_weights
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.modality import Modality

IGNORED = -100
"""The label of a token that is no target, as transformers and torch have it."""


class Volumes(Protocol):
    """Where batches take volumes from: a ``VolumeStore``, or ``DecodedVolumes``."""

    modalities: Mapping[str, Modality]

    def read(self, source: str | Path, modality: str, into: np.ndarray, draw: tuple[int, ...] | None = None) -> None:
        """Copy a prepared volume, or one window of a series, into an array; see ``VolumeStore.read``."""


@dataclass(frozen=True)
class VolumeGroup:
    """The volumes of one modality in a batch.

    voxels: (n, X, Y, Z) or (n, X, Y, Z, T), float16. run: (n,), int64: volume i stands at the ``run[i]``-th run of
    placeholders of the batch, counted row by row.
    """

    voxels: torch.Tensor
    run: torch.Tensor


@dataclass(frozen=True)
class Batch(Mapping[str, Any]):
    """What a training step works on. B rows, L tokens in the longest, N samples: one in each row, or several (packed).

    input_ids (B, L) int64, padded on the right; attention_mask (B, L) int64, 0 at padding, 1 at a row's first sample, 2
    at its second, and so on; loss_weights (B, L) float32, the weight of each token as a target; image_mask (B, L) bool,
    True at placeholders; pixel_values: modality to its volumes; num_images_per_sample (N,) int64. task_ids, task_types,
    sample_indices, metadata and draws have one entry per sample and never reach the model. draws: the numbers that
    name each sample's random choices, such as (seed, epoch, sample); empty where nothing is random, as in evaluation.

    ``len`` counts samples, ``batch[i]`` and ``batch[i:j]`` are batches of those samples, a row each; iteration gives
    batches of one, and ``batch["input_ids"]``, ``keys()`` and ``**batch`` read fields by name.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_weights: torch.Tensor
    image_mask: torch.Tensor
    pixel_values: dict[str, VolumeGroup]
    num_images_per_sample: torch.Tensor
    task_ids: tuple[str, ...]
    task_types: tuple[str, ...]
    sample_indices: torch.Tensor
    metadata: tuple[dict[str, Any], ...]
    draws: tuple[tuple[int, ...], ...] = ()

    @property
    def labels(self) -> torch.Tensor:
        """(B, L): the token itself where it is a target, -100 elsewhere."""
        return self.input_ids.masked_fill(self.loss_weights == 0, IGNORED)

    def model_inputs(self) -> dict[str, Any]:
        """What the model's forward pass accepts, and nothing else."""
        return {name: self[name] for name in ("input_ids", "attention_mask", "pixel_values", "loss_weights")}

    def apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Return the batch with every tensor changed."""
        tensors: dict[str, Any] = {
            f.name: change(self[f.name]) for f in fields(self) if isinstance(self[f.name], torch.Tensor)
        }
        groups = {n: VolumeGroup(change(g.voxels), change(g.run)) for n, g in self.pixel_values.items()}
        return replace(self, pixel_values=groups, **tensors)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with every tensor on ``device``."""
        return self.apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from where copies to a GPU can overlap with work."""
        return self.apply(torch.Tensor.pin_memory)

    def __len__(self) -> int:
        return len(self.task_ids)

    def __iter__(self) -> Iterator["Batch"]:  # type: ignore[override]  # samples, as one iterates over a batch
        return (self[i] for i in range(len(self)))

    def keys(self) -> Any:
        """The names of the fields."""
        return [field.name for field in fields(self)] + ["labels"]

    # Mapping's own would take their keys from the iteration, which gives samples.
    def items(self) -> Any:
        """The fields with their names."""
        return [(name, self[name]) for name in self.keys()]

    def values(self) -> Any:
        """The fields."""
        return [self[name] for name in self.keys()]

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        rows = range(len(self))[key]
        return self._rows(rows if isinstance(rows, range) else range(rows, rows + 1))

    def _unpacked(self) -> "Batch":
        """The batch with a row for each sample."""
        mask = self.attention_mask
        if len(mask) == len(self):
            return self
        sizes = torch.stack([torch.bincount(row, minlength=int(mask.max()) + 1)[1:] for row in mask]).flatten()
        sizes = sizes[sizes > 0]
        place = torch.arange(int(sizes.max()), device=mask.device) < sizes[:, None]

        def spread(tokens: torch.Tensor) -> torch.Tensor:
            # The samples follow each other row by row: so do the tokens that are no padding.
            return tokens.new_zeros(place.shape).masked_scatter(place, tokens[mask > 0])

        return replace(
            self,
            input_ids=spread(self.input_ids),
            attention_mask=place.long(),
            loss_weights=spread(self.loss_weights),
            image_mask=spread(self.image_mask),
        )

    def _rows(self, rows: range) -> "Batch":
        self = self._unpacked()
        index = torch.tensor(rows, dtype=torch.long, device=self.input_ids.device)
        counts = self.num_images_per_sample
        first = torch.cumsum(counts, 0) - counts
        runs = [r for row in rows for r in range(int(first[row]), int(first[row] + counts[row]))]
        new_place = torch.full((int(counts.sum()),), -1, dtype=torch.long, device=index.device)
        new_place[runs] = torch.arange(len(runs), device=index.device)
        groups = {}
        for name, group in self.pixel_values.items():
            place = new_place[group.run]
            if (place >= 0).any():
                groups[name] = VolumeGroup(group.voxels[place >= 0], place[place >= 0])
        return Batch(
            input_ids=self.input_ids[index],
            attention_mask=self.attention_mask[index],
            loss_weights=self.loss_weights[index],
            image_mask=self.image_mask[index],
            pixel_values=groups,
            num_images_per_sample=counts[index],
            task_ids=tuple(self.task_ids[row] for row in rows),
            task_types=tuple(self.task_types[row] for row in rows),
            sample_indices=self.sample_indices[index],
            metadata=tuple(self.metadata[row] for row in rows),
            draws=tuple(self.draws[row] for row in rows) if self.draws else (),
        )


def collate(
    examples: Sequence[Example],
    policy: MaskPolicy,
    store: Volumes,
    image_id: int,
    pad_id: int,
    indices: Sequence[int] | None = None,
    draws: Sequence[tuple[int, ...]] | None = None,
    pack: int = 0,
    pin: bool = False,
) -> Batch:
    """Examples to a batch; volumes come from the store, weights from the policy.

    Args:
        image_id: the placeholder's token id.
        pad_id: the token id that rows are filled up with; padding is never attended to and never a target.
        indices: each example's index in its data set; 0, 1, ... when None.
        draws: numbers that pick each example's windows of its series, see ``pick_window``, and that the batch keeps for
            its augmentation; when None the windows are the middle ones and nothing is augmented.
        pack: tokens in a row that examples share, in their order; 0 gives each a row of its own.
        pin: page-locked memory, from where copies to a GPU are fast; volumes are read straight into it.
    """
    rows = packed_rows([len(example.input_ids) for example in examples], pack)
    length = max(sum(len(examples[i].input_ids) for i in row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for row, members in enumerate(rows):
        start = 0
        for number, i in enumerate(members, 1):
            here = slice(start, start + len(examples[i].input_ids))
            input_ids[row, here] = torch.from_numpy(examples[i].input_ids)
            attention_mask[row, here] = number
            weights[row, here] = torch.from_numpy(loss_weights(examples[i], policy))
            start = here.stop
    volumes: dict[str, list[tuple[int, str, tuple[int, ...] | None]]] = {}
    everything = [(i, k, item) for i, e in enumerate(examples) for k, item in enumerate(e.conversation.volumes)]
    for run, (i, k, item) in enumerate(everything):
        draw = (*draws[i], k) if draws else None
        volumes.setdefault(item.modality, []).append((run, item.image_path, draw))
    batch = Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        loss_weights=weights,
        image_mask=(input_ids == image_id) & attention_mask.bool(),
        pixel_values={name: _gather(of_modality, name, store, pin) for name, of_modality in volumes.items()},
        num_images_per_sample=torch.tensor([len(example.conversation.volumes) for example in examples]),
        task_ids=tuple(example.conversation.task_id for example in examples),
        task_types=tuple(example.conversation.task_type for example in examples),
        sample_indices=torch.tensor(list(indices) if indices is not None else list(range(len(examples)))),
        metadata=tuple(example.conversation.metadata for example in examples),
        draws=tuple(draws or ()),
    )
    return batch.pin_memory() if pin else batch


def packed_rows(lengths: Sequence[int], pack: int) -> list[list[int]]:
    """Which samples share a row of at most ``pack`` tokens, in their order; one that is longer has its own."""
    rows: list[list[int]] = []
    room = -1
    for i, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = pack
        rows[-1].append(i)
        room -= length
    return rows


def _gather(
    volumes: Sequence[tuple[int, str, tuple[int, ...] | None]], name: str, store: Volumes, pin: bool
) -> VolumeGroup:
    """Volumes of one modality, (run, path, draw) each, read side by side into one tensor: the one copy of voxels."""
    modality = store.modalities[name]
    # Frames first, as the store has them: so each is read in one go.
    shape = (modality.grid[3], *modality.grid[:3]) if modality.is_series else modality.grid
    stack = torch.empty((len(volumes), *shape), dtype=torch.float16, pin_memory=pin)
    for into, (_, path, draw) in zip(stack.numpy(), volumes, strict=True):
        store.read(path, name, into, draw)
    runs = torch.tensor([run for run, _, _ in volumes])
    return VolumeGroup(stack.permute(0, 2, 3, 4, 1) if modality.is_series else stack, runs)


@dataclass(frozen=True)
class Collator:
    """Called with examples and a mask policy, and with options of ``batching.collate``: a batch."""

    renderer: Renderer
    store: Volumes
    pin: bool = False
    """Whether batches go to a GPU."""

    def __call__(self, examples: Sequence[Example], policy: MaskPolicy, **options: Any) -> Batch:
        pad = self.renderer.tokenizer.pad_token_id or 0
        return collate(examples, policy, self.store, self.renderer.image_id, pad, pin=self.pin, **options)
