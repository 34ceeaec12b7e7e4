"""Where the model looks: how much less likely an answer becomes when a patch of a volume is hidden.

Source: M. D. Zeiler and R. Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, section 4.2.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import ceil, prod

import numpy as np
import torch

from umbrella.conversations.schema import Conversation
from umbrella.data.batching import Batch, VolumeGroup
from umbrella.evaluation.answering import Umbrella
from umbrella.evaluation.scoring import ANSWER_ONLY
from umbrella.modality import Modality

PASSES = 256
"""At most so many blocks are hidden per volume, one after another."""

Block = tuple[slice, ...]
"""Patches along each axis."""


def occlusion(umbrella: Umbrella, conversation: Conversation, answer: str, batch_size: int = 16) -> list[np.ndarray]:
    """How much each patch of each volume speaks for an answer.

    A patch is hidden by the mean of its volume, as the model is given it: the grey of the source. Under a z-score that
    is 0, of which the embedder makes no more than its bias. The background would be a hole in the head, and a hole is
    a finding. In the air around the head the mean is the brighter value, and an effect there means just that.

    Where a volume has more than 256 patches, blocks of neighbours are hidden together, and each of them gets the effect
    of the block. What two patches both show is in neither's effect: each of them makes up for the other.

    Args:
        answer: stands in the place of the last assistant turn.
        batch_size: copies of the conversation, each with something else hidden, that are scored side by side.

    Returns:
        For each volume, in reading order, float64 over its patches (px, py, pz), or (px, py, pz, pt) of the middle
        window: the log likelihood of the answer, in nats, minus that without the patch. Positive: it speaks for it.

    Raises:
        UserError: as ``Umbrella.answer``.
    """
    batch = umbrella.collate([umbrella.renderer.render(conversation, answer)], ANSWER_ONLY)
    (seen,) = umbrella.log_likelihoods(batch)
    maps = []
    for place, volume in enumerate(conversation.volumes):
        modality = umbrella.modalities[volume.modality]
        effects = np.zeros(modality.patch_grid)
        blocks = list(blocks_of(modality.patch_grid))
        for start in range(0, len(blocks), batch_size):
            part = blocks[start : start + batch_size]
            without = umbrella.log_likelihoods(_hidden(batch, place, volume.modality, modality, part))
            for block, value in zip(part, without, strict=True):
                effects[block] = seen - value
        maps.append(effects)
    return maps


def blocks_of(patch_grid: tuple[int, ...], most: int = PASSES) -> Iterator[Block]:
    """The grid in at most so many blocks of about equal edges: single patches where they are few."""
    edges = [1] * len(patch_grid)
    while prod(map(ceil, np.divide(patch_grid, edges))) > most:
        # The axis that is cut most often gets the longer blocks.
        longest = int(np.argmax([ceil(size / edge) for size, edge in zip(patch_grid, edges, strict=True)]))
        edges[longest] += 1
    starts = [range(0, size, edge) for size, edge in zip(patch_grid, edges, strict=True)]
    for corner in product(*starts):
        yield tuple(slice(start, start + edge) for start, edge in zip(corner, edges, strict=True))


def _hidden(batch: Batch, place: int, name: str, modality: Modality, blocks: list[Block]) -> Batch:
    """A row for each block: the batch's only one, with that block of the volume at ``place`` hidden."""
    copies, volumes = len(blocks), int(batch.num_images_per_sample.sum())
    pixels = {}
    for group, content in batch.pixel_values.items():
        runs = torch.cat([content.run + copy * volumes for copy in range(copies)])
        pixels[group] = VolumeGroup(content.voxels.repeat(copies, *[1] * (content.voxels.ndim - 1)), runs)
    voxels, places = pixels[name].voxels, pixels[name].run.tolist()
    for copy, block in enumerate(blocks):
        volume = voxels[places.index(place + copy * volumes)]
        where = (slice(b.start * p, b.stop * p) for b, p in zip(block, modality.patch, strict=True))
        volume[tuple(where)] = volume.float().mean().half()
    return replace(
        batch,
        input_ids=batch.input_ids.expand(copies, -1),
        attention_mask=batch.attention_mask.expand(copies, -1),
        loss_weights=batch.loss_weights.expand(copies, -1),
        image_mask=batch.image_mask.expand(copies, -1),
        pixel_values=pixels,
        num_images_per_sample=batch.num_images_per_sample.expand(copies),
        task_ids=batch.task_ids * copies,
        task_types=batch.task_types * copies,
        sample_indices=batch.sample_indices.expand(copies),
        metadata=batch.metadata * copies,
    )
