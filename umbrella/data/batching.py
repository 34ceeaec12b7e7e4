"""Batches: padded or packed tokens, loss weights, and the volumes of each modality."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import torch
from torch.nn.utils.rnn import pad_sequence

from umbrella.conversations.schema import BLANK, ImageItem
from umbrella.data.masking import loss_weights
from umbrella.data.pipeline import Plan, from_table
from umbrella.data.rendering import Example, Renderer, load_renderer
from umbrella.data.settings import MaskPolicy
from umbrella.volumes.in_memory import ImageInMemory
from umbrella.volumes.store import DecodedVolumes, VolumeStore, open_store
from umbrella.volumes.store_files import ArrayPart

if TYPE_CHECKING:
    from umbrella.config import Settings

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

    def __repr__(self) -> str:
        """Names, shapes and types of the tensors."""
        tensors: dict[str, Any] = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        tensors |= {f"pixel_values[{name!r}].voxels": group.voxels for name, group in self.pixel_values.items()}
        lines = [f"  {name}: {tuple(tensor.shape)}, {tensor.dtype}" for name, tensor in tensors.items()]
        return "\n".join([f"Batch of {len(self)}", *lines])

    @property
    def labels(self) -> torch.Tensor:
        """(B, L), int64: the token id at targets, -100 elsewhere."""
        return self.input_ids.masked_fill(self.loss_weights == 0, IGNORED)

    def model_inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward pass."""
        return {name: getattr(self, name) for name in ("input_ids", "attention_mask", "pixel_values", "loss_weights")}

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
        # Samples are in order, row by row; the attention mask numbers the samples of a row.
        sizes = self.attention_mask.amax(1).tolist()
        places = [(row, number) for row, size in enumerate(sizes) for number in range(1, size + 1)]
        tokens = [(row, self.attention_mask[row] == number) for row, number in (places[i] for i in samples)]

        def take(values: torch.Tensor) -> torch.Tensor:
            return pad_sequence([values[row, own] for row, own in tokens], batch_first=True)

        counts, ends = self.num_images_per_sample.tolist(), self.num_images_per_sample.cumsum(0).tolist()
        runs = [run for i in samples for run in range(ends[i] - counts[i], ends[i])]
        groups = {}
        for name, group in self.pixel_values.items():
            kept = [i for i, run in enumerate(group.run.tolist()) if run in runs]
            if kept:
                new = torch.tensor([runs.index(run) for run in group.run[kept].tolist()], device=group.run.device)
                if group.index is None:
                    groups[name] = VolumeGroup(group.voxels[kept], new)
                else:
                    shown, index = group.index[kept].unique(return_inverse=True)
                    groups[name] = VolumeGroup(group.voxels[shown], new, index)
        return Batch(
            input_ids=take(self.input_ids),
            attention_mask=take(torch.ones_like(self.attention_mask)),
            loss_weights=take(self.loss_weights),
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

    Returns:
        A batch whose ``pixel_values`` are ``VolumeFiles``.
    """
    rows = _packed_rows([len(example.input_ids) for example in examples], pack)
    length = max(sum(len(examples[i].input_ids) for i in row) for row in rows)
    input_ids = torch.full((len(rows), length), renderer.tokenizer.pad_token_id or 0, dtype=torch.long)
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
    volumes: dict[str, list[tuple[int, ImageItem, tuple[int, ...] | None]]] = {}
    images = [(i, k, item) for i, e in enumerate(examples) for k, item in enumerate(e.conversation.volumes)]
    for run, (i, k, item) in enumerate(images):
        rng_key = (*rng_keys[i], k) if rng_keys else None
        volumes.setdefault(item.modality, []).append((run, item, rng_key))
    series = {name for name in volumes if renderer.modalities[name].is_series}
    files: dict[str, Any] = {name: _distinct_volumes(group, name in series) for name, group in volumes.items()}
    conversations = [example.conversation for example in examples]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        loss_weights=weights,
        image_mask=(input_ids == renderer.image_id) & attention_mask.bool(),
        pixel_values=files,
        num_images_per_sample=torch.tensor([len(c.volumes) for c in conversations]),
        task_ids=tuple(c.task_id for c in conversations),
        task_types=tuple(c.task_type for c in conversations),
        sample_indices=torch.tensor(list(range(len(examples)) if indices is None else indices)),
        metadata=tuple(c.metadata for c in conversations),
        rng_keys=tuple(rng_keys),
    )


def _distinct_volumes(volumes: Sequence[tuple[int, ImageItem, tuple[int, ...] | None]], is_series: bool) -> VolumeFiles:
    """Return the volumes of one modality, given as (run, item, rng_key).

    A volume that occurs several times is read once; a series only if it has the same window.
    """
    distinct: dict[Any, tuple[int, str | np.ndarray, tuple[int, ...] | None]] = {}
    index = []
    for _, item, rng_key in volumes:
        source: Any = item.image_path
        if isinstance(item, ImageInMemory) and not source.startswith(BLANK):
            source = item.voxels
        key = source if isinstance(source, str) else id(source), rng_key if is_series else None
        index.append(distinct.setdefault(key, (len(distinct), source, rng_key))[0])
    runs = torch.tensor([run for run, _, _ in volumes])
    shared = None if len(distinct) == len(volumes) else torch.tensor(index)
    return VolumeFiles(tuple((source, rng_key) for _, source, rng_key in distinct.values()), runs, shared)


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


@dataclass(frozen=True)
class BatchMaker:
    """Makes the micro-batches of a plan, without the voxels of their volumes."""

    settings: "Settings"
    table: ray.ObjectRef
    """The training conversations, see ``to_table``."""
    plan: Plan
    decode: bool
    """Whether to decode volumes that the store lacks, and to look up the place of each."""

    def __call__(self, start: int, stop: int) -> Batch:
        """Make the micro-batch of the positions ``start`` to ``stop``."""
        samples, rng_keys = self.plan.rows(start, stop)
        examples = [self._renderer.render(from_table(self._conversations, int(i))) for i in samples]
        batch = collate(self._renderer, examples, self.settings.mask, samples, rng_keys, self.settings.data.pack)
        if not self.decode:
            return batch
        files: dict[str, Any] = dict(batch.pixel_values)
        for name, of in files.items():
            files[name] = replace(of, parts=tuple(self._store.locate(path, name, key) for path, key in of.sources))
        return replace(batch, pixel_values=files)

    @cached_property
    def _conversations(self) -> pa.Table:
        return ray.get(self.table)

    @cached_property
    def _renderer(self) -> Renderer:
        return load_renderer(self.settings)

    @cached_property
    def _store(self) -> VolumeStore:
        return open_store(self.settings)


def left_padded(tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Move the padding of rows (B, L) from the right to the left, so that generation continues the last token."""
    length = tokens.shape[1]
    places = torch.arange(length, device=tokens.device) + attention_mask.sum(1, keepdim=True)
    return tokens.gather(1, places % length)


def _packed_rows(lengths: Sequence[int], pack: int) -> list[list[int]]:
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
