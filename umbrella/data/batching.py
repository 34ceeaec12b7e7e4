"""Batches: padded or packed tokens, loss weights, and the volumes of each modality."""

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
"""The label of tokens that the loss ignores, as in torch and transformers."""


class Volumes(Protocol):
    """The source of the volumes of a batch: ``VolumeStore`` or ``DecodedVolumes``."""

    modalities: Mapping[str, Modality]

    def read(self, source: str | Path, modality: str, into: np.ndarray, rng_key: tuple[int, ...] | None = None) -> None:
        """Copy a prepared volume, or one window of a series, into an array; see ``VolumeStore.read``."""


@dataclass(frozen=True)
class VolumeGroup:
    """The volumes of one modality in a batch.

    Attributes:
        voxels: (n, X, Y, Z) or (n, X, Y, Z, T), float16.
        run: (n,), int64. Volume i fills run ``run[i]`` of consecutive placeholders, counted row by row over the batch.
    """

    voxels: torch.Tensor
    run: torch.Tensor


@dataclass(frozen=True)
class Batch(Mapping[str, Any]):
    """The input of a training step: B rows of up to L tokens, with N samples, one in each row or several (packed).

    ``len(batch)`` is the number of samples. ``batch[i]`` and ``batch[i:j]`` are batches of these samples, one per row;
    iteration yields batches of one sample. ``batch["input_ids"]``, ``keys()`` and ``**batch`` read fields by name.

    Attributes:
        input_ids: (B, L), int64, padded on the right.
        attention_mask: (B, L), int64: 0 at padding, 1 at the first sample of a row, 2 at the second, and so on.
        loss_weights: (B, L), float32: the weight of each token as a target.
        image_mask: (B, L), bool: True at placeholders.
        pixel_values: modality to its volumes.
        num_images_per_sample: (N,), int64.
        task_ids, task_types, sample_indices, metadata: one entry per sample; the model does not receive them.
        rng_keys: per sample, the seed of its random choices, such as (seed, epoch, sample); empty in evaluation.
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
    rng_keys: tuple[tuple[int, ...], ...] = ()

    @property
    def labels(self) -> torch.Tensor:
        """(B, L), int64: the token id at targets, -100 elsewhere."""
        return self.input_ids.masked_fill(self.loss_weights == 0, IGNORED)

    def model_inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward pass."""
        return {name: self[name] for name in ("input_ids", "attention_mask", "pixel_values", "loss_weights")}

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Return the batch with ``fn`` applied to every tensor."""
        tensors: dict[str, Any] = {f.name: fn(self[f.name]) for f in fields(self) if torch.is_tensor(self[f.name])}
        groups = {n: VolumeGroup(fn(g.voxels), fn(g.run)) for n, g in self.pixel_values.items()}
        return replace(self, pixel_values=groups, **tensors)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch with every tensor on ``device``."""
        return self.apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, so that copies to a GPU can be asynchronous."""
        return self.apply(torch.Tensor.pin_memory)

    def __len__(self) -> int:
        return len(self.task_ids)

    def __iter__(self) -> Iterator["Batch"]:  # type: ignore[override]  # yields samples, not keys
        return (self[i] for i in range(len(self)))

    def keys(self) -> Any:
        """The names of the fields."""
        return [field.name for field in fields(self)] + ["labels"]

    # The defaults of Mapping take the keys from iteration, which yields samples here.
    def items(self) -> Any:
        """(name, field) pairs."""
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
        """Return the batch with one row per sample."""
        mask = self.attention_mask
        if len(mask) == len(self):
            return self
        sizes = torch.stack([torch.bincount(row, minlength=int(mask.max()) + 1)[1:] for row in mask]).flatten()
        sizes = sizes[sizes > 0]
        valid = torch.arange(int(sizes.max()), device=mask.device) < sizes[:, None]

        def unpack(tokens: torch.Tensor) -> torch.Tensor:
            # Samples keep their order, so the tokens other than padding do too.
            return tokens.new_zeros(valid.shape).masked_scatter(valid, tokens[mask > 0])

        return replace(
            self,
            input_ids=unpack(self.input_ids),
            attention_mask=valid.long(),
            loss_weights=unpack(self.loss_weights),
            image_mask=unpack(self.image_mask),
        )

    def _rows(self, rows: range) -> "Batch":
        self = self._unpacked()
        index = torch.tensor(rows, dtype=torch.long, device=self.input_ids.device)
        counts = self.num_images_per_sample
        first = torch.cumsum(counts, 0) - counts
        runs = [r for row in rows for r in range(int(first[row]), int(first[row] + counts[row]))]
        new_run = torch.full((int(counts.sum()),), -1, dtype=torch.long, device=index.device)
        new_run[runs] = torch.arange(len(runs), device=index.device)
        groups = {}
        for name, group in self.pixel_values.items():
            run = new_run[group.run]
            if (run >= 0).any():
                groups[name] = VolumeGroup(group.voxels[run >= 0], run[run >= 0])
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
            rng_keys=tuple(self.rng_keys[row] for row in rows) if self.rng_keys else (),
        )


def collate(
    examples: Sequence[Example],
    policy: MaskPolicy,
    store: Volumes,
    image_id: int,
    pad_id: int,
    indices: Sequence[int] | None = None,
    rng_keys: Sequence[tuple[int, ...]] | None = None,
    pack: int = 0,
    pin: bool = False,
) -> Batch:
    """Make a batch of examples.

    Args:
        examples: rendered conversations.
        policy: gives the loss weights.
        store: source of the volumes.
        image_id: token id of the placeholder.
        pad_id: token id of padding, which is never attended to and never a target.
        indices: index of each example in its data set; 0, 1, ... if None.
        rng_keys: seed of each example's random choices: the windows of its series (see ``pick_window``) and its
            augmentation. If None, the middle windows are used and nothing is augmented.
        pack: maximum number of tokens in a row that examples share, in order; 0 gives each example its own row.
        pin: allocate the batch in page-locked memory; volumes are read directly into it.
    """
    rows = packed_rows([len(example.input_ids) for example in examples], pack)
    length = max(sum(len(examples[i].input_ids) for i in row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for row, members in enumerate(rows):
        start = 0
        for number, i in enumerate(members, 1):
            part = slice(start, start + len(examples[i].input_ids))
            input_ids[row, part] = torch.from_numpy(examples[i].input_ids)
            attention_mask[row, part] = number
            weights[row, part] = torch.from_numpy(loss_weights(examples[i], policy))
            start = part.stop
    volumes: dict[str, list[tuple[int, str, tuple[int, ...] | None]]] = {}
    images = [(i, k, item) for i, e in enumerate(examples) for k, item in enumerate(e.conversation.volumes)]
    for run, (i, k, item) in enumerate(images):
        rng_key = (*rng_keys[i], k) if rng_keys else None
        volumes.setdefault(item.modality, []).append((run, item.image_path, rng_key))
    batch = Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        loss_weights=weights,
        image_mask=(input_ids == image_id) & attention_mask.bool(),
        pixel_values={name: _read_volumes(group, name, store, pin) for name, group in volumes.items()},
        num_images_per_sample=torch.tensor([len(example.conversation.volumes) for example in examples]),
        task_ids=tuple(example.conversation.task_id for example in examples),
        task_types=tuple(example.conversation.task_type for example in examples),
        sample_indices=torch.tensor(list(indices) if indices is not None else list(range(len(examples)))),
        metadata=tuple(example.conversation.metadata for example in examples),
        rng_keys=tuple(rng_keys or ()),
    )
    return batch.pin_memory() if pin else batch


def packed_rows(lengths: Sequence[int], pack: int) -> list[list[int]]:
    """Return the samples of each row of at most ``pack`` tokens, in order. A longer sample gets its own row."""
    rows: list[list[int]] = []
    free = -1
    for i, length in enumerate(lengths):
        if length > free:
            rows.append([])
            free = pack
        rows[-1].append(i)
        free -= length
    return rows


def _read_volumes(
    volumes: Sequence[tuple[int, str, tuple[int, ...] | None]], name: str, store: Volumes, pin: bool
) -> VolumeGroup:
    """Read the volumes of one modality, given as (run, path, rng_key), into one tensor: voxels are copied once."""
    modality = store.modalities[name]
    # The time axis comes first, as in the store, so that each volume is one contiguous read.
    shape = (modality.grid[3], *modality.grid[:3]) if modality.is_series else modality.grid
    stack = torch.empty((len(volumes), *shape), dtype=torch.float16, pin_memory=pin)
    for into, (_, path, rng_key) in zip(stack.numpy(), volumes, strict=True):
        store.read(path, name, into, rng_key)
    runs = torch.tensor([run for run, _, _ in volumes])
    return VolumeGroup(stack.permute(0, 2, 3, 4, 1) if modality.is_series else stack, runs)


@dataclass(frozen=True)
class Collator:
    """Makes batches; takes examples, a mask policy and the options of ``collate``."""

    renderer: Renderer
    store: Volumes
    pin: bool = False
    """Whether to allocate batches in page-locked memory, for copies to a GPU."""

    def __call__(self, examples: Sequence[Example], policy: MaskPolicy, **options: Any) -> Batch:
        pad = self.renderer.tokenizer.pad_token_id or 0
        return collate(examples, policy, self.store, self.renderer.image_id, pad, pin=self.pin, **options)
