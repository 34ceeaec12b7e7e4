"""Batches of one run: its renderer, its store, and what its tokenizer takes for a placeholder and for padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from umbrella.data.batching import Batch, Volumes, collate
from umbrella.data.rendering import Example, Renderer
from umbrella.data.settings import MaskPolicy


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
