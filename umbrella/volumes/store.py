"""The volume store: one memory-mapped fp16 array per volume and recipe, shared by every epoch, trial and worker."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import numpy as np

from umbrella.base import UserError
from umbrella.modality import Modality
from umbrella.volumes.preparing import RECIPE, prepare
from umbrella.volumes.reading import read_volume


class VolumeStore:
    """Prepared volumes on disk.

    Args:
        folder: where the arrays lie; made when missing. Any number of processes may share it.
        modalities: name to grid and patch.
        max_voxels: see ``read_volume``.
    """

    def __init__(self, folder: str | Path, modalities: Mapping[str, Modality], max_voxels: int) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.modalities = modalities
        self.max_voxels = max_voxels

    def path(self, source: str | Path, modality: str) -> Path:
        """Where the array of a volume lies: a name made of the file's identity (path, size, time) and the recipe."""
        try:
            stat = os.stat(source)
        except OSError as error:
            raise UserError(f"{source}: {error.strerror}") from None
        identity = [os.path.abspath(source), stat.st_size, stat.st_mtime_ns, self.modalities[modality].grid, RECIPE]
        return self.folder / (hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32] + ".npy")

    def get(self, source: str | Path, modality: str) -> np.ndarray:
        """The prepared volume, float16 of the modality's grid, memory-mapped and read-only; decoded if it is new.

        Raises:
            UserError: the volume cannot be used; names the file.
        """
        path = self.path(source, modality)
        if not path.exists():
            self._fill(path, source, modality)
        return np.load(path, mmap_mode="r")

    def _fill(self, path: Path, source: str | Path, modality: str) -> None:
        recipe = self.modalities[modality]
        voxels = read_volume(source, len(recipe.grid), self.max_voxels)
        try:
            array = prepare(voxels, recipe)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        # Renamed when whole: a reader in another process finds either nothing or everything.
        partial = path.with_suffix(f".{uuid4().hex}.partial")
        try:
            # Not tempfile, whose files no other user may read: the umask decides.
            with partial.open("xb") as file:
                np.save(file, array)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
