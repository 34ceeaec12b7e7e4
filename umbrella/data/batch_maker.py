"""The micro-batches of a training, up to the voxels of their volumes.

It imports Ray, which inference, another user of ``batching.py``, does not need.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from umbrella.config import Settings
from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Batch, collate
from umbrella.data.pipeline import Plan, from_table
from umbrella.data.rendering import Renderer, load_renderer
from umbrella.volumes.store import VolumeStore, open_store


def make_batch(
    renderer: Renderer,
    conversations: Sequence[Conversation],
    settings: Settings,
    samples: np.ndarray,
    rng_keys: Sequence[tuple[int, ...]],
) -> Batch:
    """Render the conversations of a micro-batch and collate them with the mask and packing of the settings.

    Args:
        samples, rng_keys: one per conversation, see ``Plan.rows``.
    """
    examples = [renderer.render(conversation) for conversation in conversations]
    data = settings.data
    return collate(renderer, examples, settings.mask, samples, rng_keys, data.pack, data.pack_prefixes)


@dataclass(frozen=True)
class BatchMaker:
    """Makes the micro-batches of a plan, without the voxels of their volumes."""

    settings: Settings
    table: ray.ObjectRef
    """The training conversations, see ``to_table``."""
    plan: Plan
    decode: bool
    """Whether to decode volumes that the store lacks, and to look up the place of each."""

    def __call__(self, start: int, stop: int) -> Batch:
        """Make the micro-batch of the positions ``start`` to ``stop``."""
        samples, rng_keys = self.plan.rows(start, stop)
        conversations = [from_table(self._conversations, int(i)) for i in samples]
        batch = make_batch(self._renderer, conversations, self.settings, samples, rng_keys)
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
