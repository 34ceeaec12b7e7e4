"""The volume store: one float16 array per volume and recipe on disk, shared by all epochs, trials and workers.

    <folder>/sources/<hash of the path>.json   path, size and time of a source file, its content hash, and its notes
    <folder>/<recipe>/recipe.json              the preprocessing of the arrays in this folder
    <folder>/<recipe>/<content>.npy            the array
    <folder>/<recipe>/<content>.json           geometry and intensities of the volume, see ``VolumeInfo``

Several processes and nodes can use one folder: files appear complete, by renaming, and never change. With a
``FileStorage`` as shared store, missing files are fetched from it, and new files are written to both.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod, sqrt
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from umbrella.base import UserError
from umbrella.file_storage import FileStorage
from umbrella.fileio import write_atomic
from umbrella.modality import Modality
from umbrella.volumes.preprocessing import recipe, resample_to_grid, scale_intensity
from umbrella.volumes.reading import RawVolume, content_hash, header_notes, read_volume
from umbrella.volumes.store_files import VALIDATORS, file_stamp, map_array, read_header, read_json
from umbrella.volumes.windows import has_window, num_windows, pick_window


@dataclass(frozen=True)
class VolumeInfo:
    """Geometry and intensities of a source volume.

    Intensities are in the units of the file and measured on the modality's grid, before scaling.
    """

    shape: tuple[int, ...]
    """Number of voxels along each axis of the file."""
    spacing: tuple[float, ...]
    """Voxel spacing along the axes of the file, in millimetres."""
    orientation: str
    """Directions of the axes of the file, such as "LIA"."""
    dtype: str
    minimum: float
    maximum: float
    mean: float
    deviation: float
    foreground: float
    """Fraction of grid voxels that are not background."""


class VolumeStore:
    """Prepared volumes on disk.

    Args:
        folder: folder of the arrays. It is created if missing.
        modalities: modality by name; gives grid and intensity scaling.
        max_voxels: see ``read_volume``.
        shared: a shared store for which ``folder`` is a local cache.

    Raises:
        OSError: if the folder or the shared store cannot be read or written.
    """

    def __init__(
        self,
        folder: str | Path,
        modalities: Mapping[str, Modality],
        max_voxels: int,
        shared: FileStorage | None = None,
    ) -> None:
        self.folder, self.shared = Path(folder), shared
        self.modalities = modalities
        self.max_voxels = max_voxels
        self._identities: dict[str, tuple[tuple[int, int], str, tuple[str, ...]]] = {}
        """Source path to its stamp, content name and notes."""
        self._recipe_folders: dict[str, Path] = {}
        self._shared_names: dict[str, set[str]] = {}
        (self.folder / "sources").mkdir(parents=True, exist_ok=True)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return VolumeStore, (self.folder, self.modalities, self.max_voxels, self.shared)  # without the caches

    def get(self, source: str | Path, modality: str) -> np.ndarray:
        """Return the prepared volume, memory-mapped and read-only.

        The volume is decoded if it is not in the store, its source file has changed, or its array is truncated.

        Returns:
            float16, (X, Y, Z), or (T, X, Y, Z) with all frames of the series.

        Raises:
            UserError: if the volume cannot be used. Names the file.
        """
        array = self._find(source, modality)
        if array is None:
            self._decode_and_write(source, modality)
            array = self._find(source, modality)
        if array is None:
            raise UserError(
                f"{self.path(source, modality)}: was deleted as soon as it was made; is the store being pruned?"
            )
        return array

    def read(self, source: str | Path, modality: str, into: np.ndarray, rng_key: tuple[int, ...] | None = None) -> None:
        """Copy the prepared volume, or one window of a series, into an array. Decodes like ``get``.

        A plain read is several times faster than a copy from a memory map, mostly with several threads, because all
        threads share one page table (docs/decisions.md).

        Args:
            into: contiguous float16 array, (X, Y, Z), or (T, X, Y, Z) with the frames of one window.
            rng_key: seed of the window, see ``pick_window``.

        Raises:
            UserError: see ``get``.
        """
        if not self._try_read(source, modality, into, rng_key):
            self.get(source, modality)
            if not self._try_read(source, modality, into, rng_key):
                raise UserError(f"{self.path(source, modality)}: was deleted while in use; is the store being pruned?")

    def contains(self, source: str | Path, modality: str) -> bool:
        """Return whether the array exists here or in the shared store. Nothing is decoded or fetched.

        In the shared store, only file names are checked, and listed once. ``get`` detects a truncated array there.
        """
        source = os.path.abspath(source)
        stamp = file_stamp(source)
        record = self._valid_record(source, stamp)
        if "notes" not in record:
            return False
        self._identities[source] = (stamp, record["content"], tuple(record["notes"]))
        return self._find(source, modality) is not None or self._is_shared(self.path(source, modality))

    def info(self, source: str | Path, modality: str) -> VolumeInfo:
        """Return geometry and intensities of a volume that is in the store."""
        file = self.path(source, modality).with_suffix(".json")
        if self.shared and not file.exists():
            self._fetch(file)
        raw = json.loads(file.read_text(encoding="utf-8"))
        return VolumeInfo(**raw | {"shape": tuple(raw["shape"]), "spacing": tuple(raw["spacing"])})

    def notes(self, source: str | Path) -> tuple[str, ...]:
        """Return ``header_notes`` of a source file. The store keeps them."""
        return self._identity(source)[1]

    def path(self, source: str | Path, modality: str) -> Path:
        """Return the path of a volume's array. It depends on the recipe and the content of the source file."""
        return self._recipe_folder(modality) / f"{self._identity(source)[0]}.npy"

    def _find(self, source: str | Path, modality: str) -> np.ndarray | None:
        """Return the array, or None if it is missing, truncated, or shorter than a window."""
        try:
            array = map_array(self.path(source, modality))
        except (FileNotFoundError, ValueError):
            return None
        target = self.modalities[modality]
        return array if not target.is_series or has_window(len(array), target) else None

    def _try_read(self, source: str | Path, modality: str, into: np.ndarray, rng_key: tuple[int, ...] | None) -> bool:
        """Read without decoding. Return False if the array is missing, truncated, or shorter than a window."""
        target = self.modalities[modality]
        try:
            with self.path(source, modality).open("rb", buffering=0) as file:
                shape, start = read_header(file)
                if os.fstat(file.fileno()).st_size != start + prod(shape) * into.itemsize:
                    return False
                file.seek(start)
                if not target.is_series:
                    return file.readinto(into.data) == into.nbytes
                if not has_window(shape[0], target):
                    return False
                for i, frame in enumerate(range(shape[0])[pick_window(shape[0], target, rng_key)]):
                    file.seek(start + frame * into[i].nbytes)
                    if file.readinto(into[i].data) != into[i].nbytes:
                        return False
                return True
        except (FileNotFoundError, ValueError):
            return False

    def _recipe_folder(self, modality: str) -> Path:
        if modality not in self._recipe_folders:
            text = json.dumps(recipe(self.modalities[modality]), sort_keys=True)
            folder = self.folder / hashlib.sha256(text.encode()).hexdigest()[:12]
            if read_json(folder / "recipe.json") != json.loads(text):
                folder.mkdir(exist_ok=True)
                self._write(folder / "recipe.json", text)
            self._recipe_folders[modality] = folder
        return self._recipe_folders[modality]

    def _identity(self, source: str | Path) -> tuple[str, tuple[str, ...]]:
        """Return the content name and the notes of a source file. A new or changed file is read completely.

        Notes are part of the name because they describe how the bytes are interpreted. Records of older versions have
        no notes. Their arrays may hold other values, so the new name does not match them.
        """
        source = os.path.abspath(source)
        stamp = file_stamp(source)
        cached = self._identities.get(source)
        if cached and cached[0] == stamp:
            return cached[1:]
        record = self._valid_record(source, stamp)
        if "notes" not in record:
            notes = header_notes(source)
            content = record.get("content") or content_hash(source)
            if notes:
                content += "-" + hashlib.sha256("\n".join(notes).encode()).hexdigest()[:8]
            record = {"path": source, "size": stamp[0], "time": stamp[1], "content": content, "notes": notes}
            self._write(self._record_path(source), json.dumps(record))
        self._identities[source] = (stamp, record["content"], tuple(record["notes"]))
        return self._identities[source][1:]

    def _valid_record(self, source: str, stamp: tuple[int, int]) -> dict[str, Any]:
        """Return the record of a source file, or an empty dictionary if there is none for this stamp."""
        file = self._record_path(source)
        record = read_json(file)
        if self.shared and (record.get("size"), record.get("time")) != stamp and self._fetch(file):
            record = read_json(file)
        return record if (record.get("size"), record.get("time")) == stamp else {}

    def _record_path(self, source: str) -> Path:
        return self.folder / "sources" / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.json"

    def _decode_and_write(self, source: str | Path, modality: str) -> None:
        self._recipe_folders.pop(modality, None)  # the folder may have been pruned
        stamp = file_stamp(source)
        path, target = self.path(source, modality), self.modalities[modality]
        if self._fetch(path) and self._find(source, modality) is not None:
            return
        raw, values, foreground, array = decode(source, target, self.max_voxels)
        if file_stamp(source) != stamp:
            raise UserError(f"{source}: changed while it was read; start again when it is complete")
        mean = float(values.mean(dtype=np.float64))
        info = VolumeInfo(
            shape=tuple(raw.voxels.shape),
            spacing=raw.spacing,
            orientation=raw.orientation,
            dtype=str(raw.voxels.dtype),
            minimum=float(values.min()),
            maximum=float(values.max()),
            mean=mean,
            deviation=sqrt(sum(float(np.square(plane - mean).sum(dtype=np.float64)) for plane in values) / values.size),
            foreground=float(foreground.mean()),
        )
        self._write(path.with_suffix(".json"), json.dumps(asdict(info)))
        self._write(path, lambda file: np.save(file, array))

    def _write(self, path: Path, content: str | Callable[[BinaryIO], Any]) -> None:
        write_atomic(path, content)
        if self.shared:
            self.shared.upload(self._name(path), path)

    def _fetch(self, path: Path) -> bool:
        """Copy a file from the shared store. Return False if it is missing or incomplete there."""
        return self.shared is not None and self.shared.download(self._name(path), path, VALIDATORS[path.suffix])

    def _is_shared(self, path: Path) -> bool:
        folder = path.parent.name
        if self.shared and folder not in self._shared_names:
            self._shared_names[folder] = set(self.shared.list_files(folder))
        return self._name(path) in self._shared_names.get(folder, ())

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def decode(
    source: str | Path, target: Modality, max_voxels: int
) -> tuple[RawVolume, np.ndarray, np.ndarray, np.ndarray]:
    """Read and prepare a volume.

    Returns:
        The volume as stored; its values and foreground on the grid, see ``resample_to_grid``; the prepared array, see
        ``VolumeStore.get``.

    Raises:
        UserError: if the volume cannot be used. Names the file.
    """
    fill = target.background if target.nan == "background" else None
    raw = read_volume(source, len(target.grid), max_voxels, fill)
    try:
        if target.is_series:
            num_windows(raw.voxels.shape[3], target)
        values, foreground = resample_to_grid(raw, target)
        return raw, values, foreground, scale_intensity(values, foreground, target)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


CACHE_SIZE = 16
"""Number of volumes or windows in the cache. Each turn of a conversation reads the same volumes again."""


class DecodedVolumes:
    """An in-memory replacement for ``VolumeStore``: the same values, with nothing on disk.

    Args:
        modalities: modality by name; gives grid and intensity scaling.
        max_voxels: see ``read_volume``.
    """

    def __init__(self, modalities: Mapping[str, Modality], max_voxels: int) -> None:
        self.modalities = modalities
        self.max_voxels = max_voxels
        self._cached = lru_cache(CACHE_SIZE)(self._decode)

    def read(self, source: str | Path, modality: str, into: np.ndarray, rng_key: tuple[int, ...] | None = None) -> None:
        """See ``VolumeStore.read``."""
        into[...] = self._cached(os.path.abspath(source), modality, rng_key, file_stamp(source))

    def _decode(
        self, source: str, modality: str, rng_key: tuple[int, ...] | None, stamp: tuple[int, int]
    ) -> np.ndarray:
        target = self.modalities[modality]
        *_, array = decode(source, target, self.max_voxels)
        return array[pick_window(len(array), target, rng_key)].copy() if target.is_series else array
