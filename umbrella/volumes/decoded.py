"""Volumes that are decoded when they are asked for: for who has a few, and no store."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from umbrella.modality import Modality
from umbrella.volumes.files import file_stamp
from umbrella.volumes.store import decode
from umbrella.volumes.windows import pick_window

KEPT = 16
"""Volumes, or windows of series, that are kept: a conversation asks for its own again at every turn."""


class DecodedVolumes:
    """Read like a ``VolumeStore``, with the same numbers, and nothing of it is on disk.

    Args:
        modalities: name to what its volumes are brought to.
        max_voxels: see ``read_volume``.
    """

    def __init__(self, modalities: Mapping[str, Modality], max_voxels: int) -> None:
        self.modalities = modalities
        self.max_voxels = max_voxels
        self._kept = lru_cache(KEPT)(self._decode)

    def read(self, source: str | Path, modality: str, into: np.ndarray, draw: tuple[int, ...] | None = None) -> None:
        """As ``VolumeStore.read``. Raises UserError, too."""
        into[...] = self._kept(os.path.abspath(source), modality, draw, file_stamp(source))

    def _decode(self, source: str, modality: str, draw: tuple[int, ...] | None, stamp: tuple[int, int]) -> np.ndarray:
        target = self.modalities[modality]
        *_, array = decode(source, target, self.max_voxels)
        return array[pick_window(len(array), target, draw)].copy() if target.is_series else array
