"""The volume store: one fp16 array per volume and recipe, mapped or read, shared by every epoch, trial and worker.

    <folder>/sources/<key of the path>.json    path, size and time of a file, the name of its content, and its notes
    <folder>/<recipe>/recipe.json              what is done to the volumes of this folder
    <folder>/<recipe>/<content>.npy            the array
    <folder>/<recipe>/<content>.json           what was seen of the volume on the way, see ``VolumeInfo``

Any number of processes and nodes may share the folder: a file appears whole, by renaming, and never changes. Where
another one lies behind it, a ``FileStorage``, what is missing is fetched from there, and what is made is put into both.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from umbrella.base import UserError
from umbrella.file_storage import FileStorage
from umbrella.modality import Modality
from umbrella.volumes.preprocessing import recipe, resample_to_grid, scale_intensity
from umbrella.volumes.reading import RawVolume, content_hash, header_notes, read_volume
from umbrella.volumes.store_files import READERS, file_stamp, map_array, read_header, read_json, write_atomic
from umbrella.volumes.windows import has_window, num_windows, pick_window


@dataclass(frozen=True)
class VolumeInfo:
    """What was seen of a volume when it was prepared. Intensities are its own, on the modality's grid."""

    shape: tuple[int, ...]
    """Voxels along the axes of the file."""
    spacing: tuple[float, ...]
    """Edges of a voxel along the axes of the file, in millimetres."""
    orientation: str
    """Where the axes of the file point, such as "LIA"."""
    dtype: str
    minimum: float
    maximum: float
    mean: float
    deviation: float
    foreground: float
    """The part of the grid that is not background, 0 to 1."""


class VolumeStore:
    """Prepared volumes on disk.

    Args:
        folder: where the arrays lie; made when missing.
        modalities: name to what its volumes are brought to.
        max_voxels: see ``read_volume``.
        behind: the store that this folder, a node's own, stands in front of.

    Raises:
        OSError: the folder, or the store behind it, cannot be read or written.
    """

    def __init__(
        self,
        folder: str | Path,
        modalities: Mapping[str, Modality],
        max_voxels: int,
        behind: FileStorage | None = None,
    ) -> None:
        self.folder, self.shared = Path(folder), behind
        self.modalities = modalities
        self.max_voxels = max_voxels
        self._seen: dict[str, tuple[tuple[int, int], str, tuple[str, ...]]] = {}
        self._recipes: dict[str, Path] = {}
        self._there: dict[str, set[str]] = {}
        (self.folder / "sources").mkdir(parents=True, exist_ok=True)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return VolumeStore, (self.folder, self.modalities, self.max_voxels, self.shared)  # what was seen stays here

    def get(self, source: str | Path, modality: str) -> np.ndarray:
        """The prepared volume, memory-mapped and read-only; decoded if it is new.

        A source that has changed since is decoded anew, and an array that was cut short is made again.

        Returns:
            float16, (X, Y, Z), or (T, X, Y, Z) with every frame of the series: a window of frames is contiguous.

        Raises:
            UserError: the volume cannot be used; names the file.
        """
        array = self._find(source, modality)
        if array is None:
            self._fill(source, modality)
            array = self._find(source, modality)
        if array is None:
            raise UserError(
                f"{self.path(source, modality)}: was deleted as soon as it was made; is the store being pruned?"
            )
        return array

    def read(self, source: str | Path, modality: str, into: np.ndarray, rng_key: tuple[int, ...] | None = None) -> None:
        """Copy the prepared volume, or one window of a series, into an array; decoded if it is new.

        A plain read is several times faster than a copy from a map, above all with several threads: a process has one
        table of pages, which every map changes (docs/decisions.md).

        Args:
            into: float16, contiguous, (X, Y, Z), or (T, X, Y, Z) with the frames of a window.
            rng_key: seed of the choice of the window; see ``pick_window``.

        Raises:
            UserError: as ``get``.
        """
        if not self._read(source, modality, into, rng_key):
            self.get(source, modality)
            if not self._read(source, modality, into, rng_key):
                raise UserError(f"{self.path(source, modality)}: was deleted while in use; is the store being pruned?")

    def contains(self, source: str | Path, modality: str) -> bool:
        """Whether ``get`` would find the array ready, here or in the store behind; nothing is decoded or fetched.

        Of the store behind, names are looked at, once: an array that was cut short there is found in its use.
        """
        source = os.path.abspath(source)
        stamp = file_stamp(source)
        record = self._known(source, stamp)
        if "notes" not in record:
            return False
        self._seen[source] = (stamp, record["content"], tuple(record["notes"]))
        return self._find(source, modality) is not None or self._is_behind(self.path(source, modality))

    def info(self, source: str | Path, modality: str) -> VolumeInfo:
        """What was seen of a volume that is in the store."""
        file = self.path(source, modality).with_suffix(".json")
        if self.shared and not file.exists():
            self._fetch(file)
        raw = json.loads(file.read_text(encoding="utf-8"))
        return VolumeInfo(**raw | {"shape": tuple(raw["shape"]), "spacing": tuple(raw["spacing"])})

    def notes(self, source: str | Path) -> tuple[str, ...]:
        """What is unusual in the header of a volume, see ``header_notes``; kept in the store."""
        return self._identity(source)[1]

    def path(self, source: str | Path, modality: str) -> Path:
        """Where the array of a volume lies: a name made of the recipe and of the content of the file."""
        return self._recipe_folder(modality) / f"{self._identity(source)[0]}.npy"

    def _find(self, source: str | Path, modality: str) -> np.ndarray | None:
        """The array, if it is there, whole, and long enough for a window."""
        try:
            array = map_array(self.path(source, modality))
        except (FileNotFoundError, ValueError):  # not there, or cut short
            return None
        target = self.modalities[modality]
        return array if not target.is_series or has_window(len(array), target) else None

    def _read(self, source: str | Path, modality: str, into: np.ndarray, rng_key: tuple[int, ...] | None) -> bool:
        """``read``, or False where the array is not there, cut short, or shorter than a window."""
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
                for frame, place in enumerate(range(shape[0])[pick_window(shape[0], target, rng_key)]):
                    file.seek(start + place * into[frame].nbytes)
                    if file.readinto(into[frame].data) != into[frame].nbytes:
                        return False
                return True
        except (FileNotFoundError, ValueError):
            return False

    def _recipe_folder(self, modality: str) -> Path:
        if modality not in self._recipes:
            text = json.dumps(recipe(self.modalities[modality]), sort_keys=True)
            folder = self.folder / hashlib.sha256(text.encode()).hexdigest()[:12]
            if read_json(folder / "recipe.json") != json.loads(text):
                folder.mkdir(exist_ok=True)
                self._write(folder / "recipe.json", text.encode())
            self._recipes[modality] = folder
        return self._recipes[modality]

    def _identity(self, source: str | Path) -> tuple[str, tuple[str, ...]]:
        """The name of a file's content, and its notes; the file is read when it is new, or has another size or time.

        The notes are part of the name, because what they state decides how the bytes are read. Records of older
        versions have none: their arrays of files with notes may hold other values, and are not found by the new name.
        """
        source = os.path.abspath(source)
        stamp = file_stamp(source)
        seen = self._seen.get(source)
        if seen and seen[0] == stamp:
            return seen[1:]
        record = self._known(source, stamp)
        if "notes" not in record:
            notes = header_notes(source)
            content = record.get("content") or content_hash(source)
            if notes:
                content += "-" + hashlib.sha256("\n".join(notes).encode()).hexdigest()[:8]
            record = {"path": source, "size": stamp[0], "time": stamp[1], "content": content, "notes": notes}
            self._write(self._record(source), json.dumps(record).encode())
        self._seen[source] = (stamp, record["content"], tuple(record["notes"]))
        return self._seen[source][1:]

    def _known(self, source: str, stamp: tuple[int, int]) -> dict[str, Any]:
        """The record of a file, if the file is still as it was when it was read; else nothing."""
        file = self._record(source)
        record = read_json(file)
        if self.shared and (record.get("size"), record.get("time")) != stamp and self._fetch(file):
            record = read_json(file)
        return record if (record.get("size"), record.get("time")) == stamp else {}

    def _record(self, source: str) -> Path:
        return self.folder / "sources" / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.json"

    def _fill(self, source: str | Path, modality: str) -> None:
        self._recipes.pop(modality, None)  # somebody may have pruned its folder away
        stamp = file_stamp(source)
        path, target = self.path(source, modality), self.modalities[modality]
        if self._fetch(path) and self._find(source, modality) is not None:  # long enough for a window, too
            return
        raw, values, foreground, array = decode(source, target, self.max_voxels)
        if file_stamp(source) != stamp:
            raise UserError(f"{source}: was changed while it was read; start again when it is whole")
        mean = float(values.mean(dtype=np.float64))
        facts = VolumeInfo(
            shape=tuple(raw.voxels.shape),
            spacing=raw.spacing,
            orientation=raw.orientation,
            dtype=str(raw.voxels.dtype),
            minimum=float(values.min()),
            maximum=float(values.max()),
            mean=mean,
            deviation=sqrt(sum(float(np.square(part - mean).sum(dtype=np.float64)) for part in values) / values.size),
            foreground=float(foreground.mean()),
        )
        self._write(path.with_suffix(".json"), json.dumps(asdict(facts)).encode())
        self._write(path, array)

    def _write(self, path: Path, content: bytes | np.ndarray) -> None:
        write_atomic(path, content)
        if self.shared:
            self.shared.put(self._name(path), path)

    def _fetch(self, path: Path) -> bool:
        """Bring a file from the store behind, if there is one and it has it."""
        return self.shared is not None and self.shared.fetch(self._name(path), path, READERS[path.suffix])

    def _is_behind(self, path: Path) -> bool:
        folder = path.parent.name
        if self.shared and folder not in self._there:
            self._there[folder] = self.shared.names(folder)
        return path.name in self._there.get(folder, ())

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def decode(
    source: str | Path, target: Modality, max_voxels: int
) -> tuple[RawVolume, np.ndarray, np.ndarray, np.ndarray]:
    """A file to what is in it, that on its grid with its foreground (see ``resample_to_grid``), and the array.

    The array is what ``VolumeStore.get`` returns.

    Raises:
        UserError: the volume cannot be used; names the file.
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

    def read(self, source: str | Path, modality: str, into: np.ndarray, rng_key: tuple[int, ...] | None = None) -> None:
        """As ``VolumeStore.read``. Raises UserError, too."""
        into[...] = self._kept(os.path.abspath(source), modality, rng_key, file_stamp(source))

    def _decode(
        self, source: str, modality: str, rng_key: tuple[int, ...] | None, stamp: tuple[int, int]
    ) -> np.ndarray:
        target = self.modalities[modality]
        *_, array = decode(source, target, self.max_voxels)
        return array[pick_window(len(array), target, rng_key)].copy() if target.is_series else array
