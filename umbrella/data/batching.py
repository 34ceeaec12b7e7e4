"""Batches: padded or packed tokens, loss weights, and the volumes of each modality."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from umbrella.conversations.schema import BLANK
from umbrella.data.masking import loss_weights
from umbrella.data.packing import VolumeKey, pack_rows, share_prefixes
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy
from umbrella.volumes.in_memory import ImageInMemory
from umbrella.volumes.store import DecodedVolumes, VolumeStore
from umbrella.volumes.store_files import ArrayPart

IGNORED = -100
"""The label of tokens that the loss ignores, as in torch and transformers."""


@dataclass(frozen=True)
class VolumeGroup:
    """The volumes of one modality in a batch.

    Attributes:
        voxels: (v, X, Y, Z) or (v, X, Y, Z, T), float16.
        run: (n,), int64: the runs of consecutive placeholders that the volumes fill, counted row by row over the batch.
        index: (n,), int64: run ``run[i]`` shows volume ``index[i]``. None: volume i, and v is n.
    """

    voxels: torch.Tensor
    run: torch.Tensor
    index: torch.Tensor | None = None

    def separate(self) -> "VolumeGroup":
        """Return the group with a volume of its own for each run."""
        return self if self.index is None else VolumeGroup(self.voxels[self.index], self.run)

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "VolumeGroup":
        """Return the group with ``fn`` applied to every tensor."""
        return VolumeGroup(fn(self.voxels), fn(self.run), None if self.index is None else fn(self.index))


@dataclass(frozen=True)
class VolumeFiles:
    """The volumes of one modality in a batch, before they are read; see ``VolumeGroup`` for ``run`` and ``index``.

    Attributes:
        sources: path or prepared voxels of each volume, and the seed of its window (``Modality.pick_window``).
        parts: place of each volume in the store, which saves the look-up. Empty if not known.
    """

    sources: tuple[tuple[str | np.ndarray, tuple[int, ...] | None], ...]
    run: torch.Tensor
    index: torch.Tensor | None = None
    parts: tuple[ArrayPart, ...] = ()


@dataclass(frozen=True)
class Batch:
    """The input of a training step: B rows of up to L tokens, with N samples, one in each row or several (packed).

    ``len(batch)`` is the number of samples. ``batch[i]`` and ``batch[i:j]`` are batches of these samples, one per row,
    padded with 0; iteration yields batches of one sample.

    Attributes:
        input_ids: (B, L), int64, padded on the right.
        attention_mask: (B, L), int64: 0 at padding, 1 at the first segment of a row, 2 at the second, and so on. A
            segment is a sample, a prefix that samples share, or what follows the prefix in one of them.
        loss_weights: (B, L), float32: the weight of each token as a target, in a prefix the sum over its samples.
        image_mask: (B, L), bool: True at placeholders.
        pixel_values: modality to its volumes.
        num_images_per_sample: (N,), int64.
        task_ids, task_types, sample_indices, metadata: one entry per sample; the model does not receive them.
        rng_keys: per sample, the seed of its random choices, such as (seed, epoch, sample); empty in evaluation.
        places: (N, 3), int64: row of each sample, number of its segment, number of its prefix's segment or 0. None if
            no prefix is shared: then the samples are in order, row by row.
        weights_of_samples: (N, S), float32: the loss weights of each sample alone. None if no prefix is shared.
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
    places: torch.Tensor | None = None
    weights_of_samples: torch.Tensor | None = None

    def __repr__(self) -> str:
        """Names, shapes and types of the tensors."""
        tensors: dict[str, Any] = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        read = {name: group for name, group in self.pixel_values.items() if isinstance(group, VolumeGroup)}
        tensors |= {f"pixel_values[{name!r}].voxels": group.voxels for name, group in read.items()}
        lines = [f"  {name}: {tuple(tensor.shape)}, {tensor.dtype}" for name, tensor in tensors.items()]
        return "\n".join([f"Batch of {len(self)}", *lines])

    @property
    def labels(self) -> torch.Tensor:
        """(B, L), int64: the token id at targets, -100 elsewhere."""
        return self.input_ids.masked_fill(self.loss_weights == 0, IGNORED)

    @property
    def prefix(self) -> torch.Tensor | None:
        """(B, L), int64: number of the segment that a token attends to beside its own, or 0. None: 0 everywhere."""
        if self.places is None:
            return None
        row, own, prefix = self.places.unbind(1)
        of_segments = self.attention_mask.new_zeros(len(self.attention_mask), 2 * len(self) + 1)
        of_segments[row, own] = prefix
        return of_segments.gather(1, self.attention_mask)

    def model_inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward pass."""
        names = ("input_ids", "attention_mask", "pixel_values", "loss_weights")
        return {name: getattr(self, name) for name in (*names, *(("prefix",) if self.places is not None else ()))}

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Return the batch with ``fn`` applied to every tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {name: fn(value) for name, value in values.items() if torch.is_tensor(value)}
        groups = {name: group.apply(fn) for name, group in self.pixel_values.items()}
        return replace(self, pixel_values=groups, **tensors)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with every tensor on ``device``."""
        return self.apply(lambda tensor: tensor.to(device))

    def __len__(self) -> int:
        return len(self.task_ids)

    def __getitem__(self, key: int | slice) -> "Batch":
        chosen = range(len(self))[key]
        samples = chosen if isinstance(chosen, range) else range(chosen, chosen + 1)
        if self.places is None:
            sizes = self.attention_mask.amax(1).tolist()
            places = [[row, number, 0] for row, size in enumerate(sizes) for number in range(1, size + 1)]
        else:
            places = self.places.tolist()
        segments = self.attention_mask
        tokens = [
            (row, (segments[row] == number) | (segments[row] == (prefix or number)))
            for row, number, prefix in (places[i] for i in samples)
        ]

        def take(values: torch.Tensor) -> torch.Tensor:
            return pad_sequence([values[row, own] for row, own in tokens], batch_first=True)

        input_ids, weights = take(self.input_ids), self.weights_of_samples
        is_start = self.image_mask & ~pad(self.image_mask[:, :-1], (1, 0))
        runs_of_tokens = is_start.flatten().cumsum(0).view_as(is_start) - 1
        runs = [run for row, own in tokens for run in runs_of_tokens[row, own & is_start[row]].tolist()]
        groups = {}
        for name, group in self.pixel_values.items():
            numbers = range(len(group.run)) if group.index is None else group.index.tolist()
            shown = dict(zip(group.run.tolist(), numbers, strict=True))
            if kept := [(i, shown[run]) for i, run in enumerate(runs) if run in shown]:
                new_runs, volumes = torch.tensor(kept, device=group.run.device).unbind(1)
                distinct, index = volumes.unique(return_inverse=True)
                repeats = len(distinct) < len(volumes)
                voxels = group.voxels[distinct if repeats else volumes]
                groups[name] = VolumeGroup(voxels, new_runs, index if repeats else None)
        return Batch(
            input_ids=input_ids,
            attention_mask=take(torch.ones_like(self.attention_mask)),
            loss_weights=take(self.loss_weights) if weights is None else weights[list(samples), : input_ids.shape[1]],
            image_mask=take(self.image_mask),
            pixel_values=groups,
            num_images_per_sample=self.num_images_per_sample[list(samples)],
            task_ids=tuple(self.task_ids[i] for i in samples),
            task_types=tuple(self.task_types[i] for i in samples),
            sample_indices=self.sample_indices[list(samples)],
            metadata=tuple(self.metadata[i] for i in samples),
            rng_keys=tuple(self.rng_keys[i] for i in samples) if self.rng_keys else (),
        )


def collate(
    renderer: Renderer,
    examples: Sequence[Example],
    policy: MaskPolicy,
    indices: Sequence[int] | np.ndarray | None = None,
    rng_keys: Sequence[tuple[int, ...]] = (),
    pack: int = 0,
    pack_prefixes: bool = False,
) -> Batch:
    """Make a batch of examples, whose volumes are not read.

    Args:
        renderer: gives the ids of the placeholder and of padding, which is never attended to and never a target.
        examples: rendered conversations.
        policy: gives the loss weights.
        indices: index of each example in its data set; 0, 1, ... if None.
        rng_keys: seed of each example's random choices: windows of its series (``Modality.pick_window``) and its
            augmentation. If empty, the middle windows are used and nothing is augmented.
        pack: maximum number of tokens in a row that examples share, in order; 0 gives each example its own row.
        pack_prefixes: whether examples that begin with the same turns and volumes share these in a row, which then has
            at most ``packing.SAMPLES_PER_ROW`` times the tokens of the longest example if ``pack`` is 0.

    Returns:
        A batch whose ``pixel_values`` are ``VolumeFiles``.
    """
    weights = [loss_weights(example, policy) for example in examples]
    volumes: list[list[VolumeKey]] = []
    sources: dict[VolumeKey, str | np.ndarray] = {}
    for i, example in enumerate(examples):
        volumes.append([])
        for k, item in enumerate(example.conversation.volumes):
            source: Any = item.image_path
            if isinstance(item, ImageInMemory) and not source.startswith(BLANK):
                source = item.voxels
            name = source if isinstance(source, str) else id(source)
            is_random = rng_keys and renderer.modalities[item.modality].is_series
            key = item.modality, name, (*rng_keys[i], k) if is_random else None
            volumes[-1].append(key)
            sources[key] = source
    groups = share_prefixes(examples, weights, volumes) if pack_prefixes else [([i], 0, 0) for i in range(len(weights))]
    rows = pack_rows(groups, [*map(len, weights)], pack)
    shares = any(segment.prefix for row in rows for segment in row)
    length = max(sum(len(weights[s.samples[0]][s.tokens]) for s in row) for row in rows)
    input_ids = torch.full((len(rows), length), renderer.tokenizer.pad_token_id or 0, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    row_weights = torch.zeros(len(rows), length)
    places: dict[int, tuple[int, int, int]] = {}
    shown: list[VolumeKey] = []
    for row, segments in enumerate(rows):
        start = 0
        for number, segment in enumerate(segments, 1):
            first = segment.samples[0]
            ids = examples[first].input_ids[segment.tokens]
            part = slice(start, start + len(ids))
            input_ids[row, part] = torch.from_numpy(ids)
            attention_mask[row, part] = number
            row_weights[row, part] = torch.from_numpy(sum(weights[i][segment.tokens] for i in segment.samples))
            # The segment of a sample comes after that of its prefix, and replaces it here.
            places[first] = row, number, segment.prefix
            shown += volumes[first][segment.volumes]
            start = part.stop
    files: dict[str, Any] = {}
    for name in dict.fromkeys(modality for modality, *_ in shown):
        runs = [run for run, key in enumerate(shown) if key[0] == name]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(shown[run] for run in runs))}
        index = None if len(numbers) == len(runs) else torch.tensor([numbers[shown[run]] for run in runs])
        files[name] = VolumeFiles(tuple((sources[key], key[2]) for key in numbers), torch.tensor(runs), index)
    conversations = [example.conversation for example in examples]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        loss_weights=row_weights,
        image_mask=(input_ids == renderer.image_id) & attention_mask.bool(),
        pixel_values=files,
        num_images_per_sample=torch.tensor([len(c.volumes) for c in conversations]),
        task_ids=tuple(c.task_id for c in conversations),
        task_types=tuple(c.task_type for c in conversations),
        sample_indices=torch.tensor(list(range(len(examples)) if indices is None else indices)),
        metadata=tuple(c.metadata for c in conversations),
        rng_keys=tuple(rng_keys),
        places=torch.tensor([places[i] for i in range(len(examples))]) if shares else None,
        weights_of_samples=pad_sequence([*map(torch.from_numpy, weights)], batch_first=True) if shares else None,
    )


@dataclass(frozen=True)
class Collator:
    """Makes batches of examples, with their volumes."""

    renderer: Renderer
    store: VolumeStore | DecodedVolumes
    pin: bool = False
    """Whether to allocate batches in page-locked memory, for copies to a GPU; volumes are read directly into it."""

    def __call__(self, *args: Any, **options: Any) -> Batch:
        """Make a batch of examples and read its volumes. For the arguments see ``collate``."""
        return self.read_volumes(collate(self.renderer, *args, **options))

    def read_volumes(self, batch: Batch) -> Batch:
        """Read the volumes of a batch of ``collate``."""
        files: dict[str, Any] = batch.pixel_values
        batch = replace(batch, pixel_values={name: self._read(of, name) for name, of in files.items()})
        return batch.apply(torch.Tensor.pin_memory) if self.pin else batch

    def _read(self, files: VolumeFiles, name: str) -> VolumeGroup:
        """Read the volumes of one modality into one tensor: voxels are copied once."""
        modality = self.store.modalities[name]
        # The time axis comes first, as in the store, so that each volume is one contiguous read.
        shape = (modality.grid[3], *modality.grid[:3]) if modality.is_series else modality.grid
        stack = torch.empty((len(files.sources), *shape), dtype=torch.float16, pin_memory=self.pin)
        for into, (source, rng_key), part in zip_longest(stack.numpy(), files.sources, files.parts):
            if part and part.copy(into):
                continue
            if not isinstance(source, str):
                into[...] = source
            elif source.startswith(BLANK):
                # The mean of a z-score, or the middle of 0..1: one value for all subjects. After a z-score over all
                # voxels, the mean of the foreground would reveal how much of the volume the head fills.
                into.fill(0.5 if modality.intensity == "percentiles" else 0.0)
            else:
                self.store.read(source, name, into, rng_key)
        voxels = stack.permute(0, 2, 3, 4, 1) if modality.is_series else stack
        return VolumeGroup(voxels, files.run, files.index)


def left_padded(tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Move the padding of rows (B, L) from the right to the left, so that generation continues the last token."""
    length = tokens.shape[1]
    places = torch.arange(length, device=tokens.device) + attention_mask.sum(1, keepdim=True)
    return tokens.gather(1, places % length)
