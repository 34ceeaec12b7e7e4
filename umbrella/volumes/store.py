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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, islice
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import joblib
import numpy as np

from umbrella.base import ProgressBar, UserError
from umbrella.cluster import alive_nodes, has_several_nodes
from umbrella.file_storage import FileStorage, is_remote, local_path
from umbrella.fileio import write_atomic
from umbrella.modality import Modality
from umbrella.paths import VOLUMES
from umbrella.volumes.preprocessing import recipe, resample_to_grid, scale_intensity
from umbrella.volumes.reading import Image, RawVolume, header_notes, image_name, image_size, read_volume
from umbrella.volumes.store_files import ArrayPart, content_hash, file_stamp, is_array, read_header, read_json

if TYPE_CHECKING:
    from umbrella.config import Settings


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
        self.folder, self.modalities, self.max_voxels, self.shared = Path(folder), modalities, max_voxels, shared
        names = {name: _hash(json.dumps(recipe(modality), sort_keys=True)) for name, modality in modalities.items()}
        self._folders = {modality: self.folder / name[:12] for modality, name in names.items()}
        self._records: dict[str, dict[str, Any]] = {}
        """Source path to its record in ``sources/``."""
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
        return self._use(source, modality, lambda file, shape, start: np.memmap(file, np.float16, "r", start, shape))

    def read(self, source: str | Path, modality: str, into: np.ndarray, rng_key: tuple[int, ...] | None = None) -> None:
        """Copy the prepared volume, or one window of a series, into an array. Decodes like ``get``.

        A plain read is several times faster than a copy from a memory map, mostly with several threads, because all
        threads share one page table (docs/decisions.md).

        Args:
            into: contiguous float16 array, (X, Y, Z), or (T, X, Y, Z) with the frames of one window.
            rng_key: seed of the window, see ``Modality.pick_window``.

        Raises:
            UserError: see ``get``.
        """

        def copy(file: BinaryIO, shape: tuple[int, ...], start: int) -> bool:
            if not self._part(file, shape, start, modality, rng_key).read(file.fileno(), into):
                raise ValueError("truncated")
            return True

        self._use(source, modality, copy)

    def locate(self, source: str | Path, modality: str, rng_key: tuple[int, ...] | None = None) -> ArrayPart:
        """Return the place of what ``read`` copies. Decodes like ``get``."""
        return self._use(source, modality, lambda file, shape, at: self._part(file, shape, at, modality, rng_key))

    def _part(
        self, file: BinaryIO, shape: tuple[int, ...], start: int, modality: str, rng_key: tuple[int, ...] | None
    ) -> ArrayPart:
        target = self.modalities[modality]
        frames = range(shape[0])[target.pick_window(shape[0], rng_key)] if target.is_series else range(1)
        return ArrayPart(file.name, tuple(start + 2 * prod(shape[1:]) * frame for frame in frames))

    def contains(self, source: str | Path, modality: str) -> bool:
        """Return whether the array exists here or in the shared store. Nothing is decoded or fetched.

        In the shared store, only file names are checked, and listed once. ``get`` detects a truncated array there.
        """
        if not self._known_record(os.path.abspath(source)):
            return False
        if self._open(source, modality, lambda *array: True):
            return True
        path = self.path(source, modality)
        folder = path.parent.name
        if self.shared and folder not in self._shared_names:
            self._shared_names[folder] = set(self.shared.list_files(folder))
        return f"{folder}/{path.name}" in self._shared_names.get(folder, ())

    def info(self, source: str | Path, modality: str) -> VolumeInfo:
        """Return geometry and intensities of a volume that is in the store."""
        file = self.path(source, modality).with_suffix(".json")
        if not file.exists():
            self._fetch(file)
        raw = json.loads(file.read_text(encoding="utf-8"))
        return VolumeInfo(**raw | {"shape": tuple(raw["shape"]), "spacing": tuple(raw["spacing"])})

    def notes(self, source: str | Path) -> tuple[str, ...]:
        """Return ``header_notes`` of a source file. The store keeps them."""
        return tuple(self._record(source)["notes"])

    def path(self, source: str | Path, modality: str) -> Path:
        """Return the path of a volume's array. It depends on the recipe and the content of the source file."""
        return self._folders[modality] / f"{self._record(source)['content']}.npy"

    def _use(self, source: str | Path, modality: str, use: Callable[[BinaryIO, tuple[int, ...], int], Any]) -> Any:
        """Return ``use(file, shape, offset of the values)`` of an array, which is decoded first if necessary."""
        result = self._open(source, modality, use)
        if result is None:
            self._decode_and_write(source, modality)
            result = self._open(source, modality, use)
        if result is None:
            raise UserError(f"{self.path(source, modality)}: was deleted while in use; is the store being pruned?")
        return result

    def _open(self, source: str | Path, modality: str, use: Callable[[BinaryIO, tuple[int, ...], int], Any]) -> Any:
        """Return the result of ``use``, or None if the array is missing, truncated, or shorter than a window."""
        target = self.modalities[modality]
        with suppress(FileNotFoundError, ValueError), self.path(source, modality).open("rb", buffering=0) as file:
            shape, start = read_header(file)
            if not target.is_series or shape[0] >= target.window_length:
                return use(file, shape, start)
        return None

    def _known_record(self, source: str) -> dict[str, Any] | None:
        """Return the record of a source file, or None if there is none for its present size and time."""
        stamp, file = file_stamp(source), self.folder / "sources" / f"{_hash(source)[:32]}.json"
        for get in (
            lambda: self._records.get(source, {}),
            lambda: read_json(file),
            lambda: read_json(file) if self._fetch(file) else {},
        ):
            record = get()
            # Records of older versions have no notes; their arrays may hold other values.
            if "notes" in record and (record["size"], record["time"]) == stamp:
                self._records[source] = record
                return record
        return None

    def _record(self, source: str | Path) -> dict[str, Any]:
        """Return the record of a source file. A new or changed file is read completely."""
        source = os.path.abspath(source)
        if known := self._known_record(source):
            return known
        size, changed = file_stamp(source)
        notes, content = header_notes(source), content_hash(source)
        if notes:  # they describe how the bytes are interpreted
            content += "-" + _hash("\n".join(notes))[:8]
        record = {"path": source, "size": size, "time": changed, "content": content, "notes": notes}
        self._write(self.folder / "sources" / f"{_hash(source)[:32]}.json", json.dumps(record))
        self._records[source] = record
        return record

    def _decode_and_write(self, source: str | Path, modality: str) -> None:
        stamp = file_stamp(source)
        path, target = self.path(source, modality), self.modalities[modality]
        path.parent.mkdir(exist_ok=True)
        description = path.with_name("recipe.json")
        if read_json(description) != recipe(target):
            self._write(description, json.dumps(recipe(target), sort_keys=True))
        if self._fetch(path) and self._open(source, modality, lambda *array: True):
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
            self.shared.upload(path.relative_to(self.folder).as_posix(), path)

    def _fetch(self, path: Path) -> bool:
        """Copy a file from the shared store. Return False if it is missing or incomplete there."""
        if not self.shared:
            return False
        path.parent.mkdir(exist_ok=True)
        is_complete = is_array if path.suffix == ".npy" else lambda file: bool(read_json(file))
        return self.shared.download(path.relative_to(self.folder).as_posix(), path, is_complete)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def open_store(settings: "Settings") -> VolumeStore:
    """Open the volume store. With ``resources.node_store`` or an object store, a local folder caches the shared one."""
    resources = settings.resources
    default = Path(resources.storage).absolute() / VOLUMES
    # Arrays are memory-mapped, so those of an object store need local copies.
    local = resources.node_store or (str(default) if is_remote(resources.store) else "")
    shared = FileStorage(resources.store or str(default)) if local else None
    folder = Path(local).absolute() if local else local_path(resources.store) if resources.store else default
    return VolumeStore(folder, settings.modalities, settings.data.max_voxels, shared)


def decode(source: Image, target: Modality, max_voxels: int) -> tuple[RawVolume, np.ndarray, np.ndarray, np.ndarray]:
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
            target.num_windows(raw.voxels.shape[3])
        values, foreground = resample_to_grid(raw, target)
        return raw, values, foreground, scale_intensity(values, foreground, target)
    except UserError as error:
        raise UserError(f"{image_name(source)}: {error}") from None


def prepare(source: Image, target: Modality, max_voxels: int, rng_key: tuple[int, ...] | None = None) -> np.ndarray:
    """Read and prepare a volume, or one window of a series, as ``VolumeStore.read`` does."""
    *_, array = decode(source, target, max_voxels)
    return array[target.pick_window(len(array), rng_key)].copy() if target.is_series else array


CACHE_SIZE = 16
"""Number of volumes or windows in the cache. Each turn of a conversation reads the same volumes again."""


class DecodedVolumes:
    """An in-memory replacement for ``VolumeStore``: the same values, with nothing on disk."""

    def __init__(self, modalities: Mapping[str, Modality], max_voxels: int) -> None:
        self.modalities, self.max_voxels = modalities, max_voxels
        self._cached = lru_cache(CACHE_SIZE)(self._decode)

    def read(self, source: str | Path, modality: str, into: np.ndarray, rng_key: tuple[int, ...] | None = None) -> None:
        """See ``VolumeStore.read``."""
        into[...] = self._cached(os.path.abspath(source), modality, rng_key, file_stamp(source))

    def _decode(
        self, source: str, modality: str, rng_key: tuple[int, ...] | None, stamp: tuple[int, int]
    ) -> np.ndarray:
        return prepare(source, self.modalities[modality], self.max_voxels, rng_key)


MIN_PARALLEL_BYTES = 2**26
"""Size of the volumes above which decoding uses several processes."""
VOLUMES_PER_TASK = 4
"""Larger groups make the progress bar jump; smaller ones cost more communication than work."""
Volume = tuple[str, str]
"""(path, modality)."""


def decode_volumes(
    store: VolumeStore, volumes: Iterable[Volume], processes: int, progress: ProgressBar
) -> dict[Volume, str]:
    """Decode the volumes that are not in the store, in parallel.

    Args:
        store: destination.
        volumes: volumes to decode.
        processes: number of parallel processes; 0 for one per CPU of this machine, or of the Ray cluster if this
            process has joined one with several nodes.
        progress: progress bar.

    Returns:
        The reasons why some volumes cannot be decoded.

    Raises:
        OSError: the store cannot be written.
    """
    new, size = [], 0
    for path, modality in sorted(set(volumes)):
        with suppress(UserError):  # reported when it is decoded
            if store.contains(path, modality):
                continue
        new.append((path, modality))
        with suppress(OSError):
            size += image_size(path)
    if size <= MIN_PARALLEL_BYTES:
        processes = 1
    step = 1 if processes == 1 else VOLUMES_PER_TASK
    groups = [new[start : start + step] for start in range(0, len(new), step)]
    if processes != 1 and has_several_nodes():
        results = _decode_on_nodes(store, groups, processes)
    else:
        tasks = joblib.Parallel(n_jobs=processes or joblib.cpu_count(), return_as="generator", batch_size=1)
        results = tasks(joblib.delayed(_decode_group)(store, group) for group in groups)
    reasons = zip(progress(new, "decoding volumes"), chain.from_iterable(results), strict=True)
    return {volume: reason for volume, reason in reasons if reason}


def _decode_group(store: VolumeStore, volumes: Sequence[Volume]) -> list[str]:
    """Decode volumes into the store. Return the reason why each cannot be decoded, or "" if it is stored."""
    reasons = []
    for path, modality in volumes:
        try:
            store.get(path, modality)
            reasons.append("")
        except UserError as error:
            reasons.append(str(error))
    return reasons


def _decode_on_nodes(store: VolumeStore, groups: Iterable[Sequence[Volume]], processes: int) -> Iterator[list[str]]:
    import ray

    # Ray prefers nodes without GPUs for tasks that need none.
    task, groups = ray.remote(num_cpus=1)(_decode_group), iter(groups)
    at_once = processes or 2 * int(sum(node["Resources"].get("CPU", 0) for node in alive_nodes()))
    pending = deque(task.remote(store, group) for group in islice(groups, at_once))
    while pending:
        try:
            yield ray.get(pending.popleft())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        pending.extend(task.remote(store, group) for group in islice(groups, 1))
