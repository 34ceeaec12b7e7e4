"""Read one image file as it is stored, without reorientation, scaling or conversion.

The header is checked first: the size that it states is compared with the size of the file before memory is allocated.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from umbrella.base import UserError
from umbrella.volumes.image_formats import image_files, open_image

SAMPLED = 4099
"""Of whole numbers every so many are looked at first: where two of them differ, the volume is not constant."""
LONGEST_AXIS = 2**15
"""Voxels along an axis of space, at most. NIfTI-1 allows 32,767."""


@dataclass(frozen=True)
class RawVolume:
    """A volume as it is stored.

    voxels: (I, J, K) or (I, J, K, T), any real type, in the order of the file. A value is ``slope * voxel + inter``.
    affine: (4, 4), voxel indices to RAS+ millimetres.
    """

    voxels: np.ndarray
    slope: float
    inter: float
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, ...]:
        """Edges of a voxel along I, J, K, in millimetres."""
        return tuple(float(edge) for edge in voxel_sizes(self.affine))

    @property
    def orientation(self) -> str:
        """Where I, J, K point, such as "LIA"; RAS+ is "RAS"."""
        return "".join(code or "?" for code in nib.aff2axcodes(self.affine))


def count_axes(path: str | Path) -> int:
    """Axes of an image by its header alone: 3 of a volume, 4 of a series. Further ones of length 1 do not count.

    Raises:
        UserError: it cannot be read as an image.
    """
    with _errors_name(path):
        return len(_without_ones(open_image(Path(path)).shape, 3))


def header_notes(path: str | Path) -> tuple[str, ...]:
    """What is unusual in the header of an image, and changes how the image is read: a phrase for each.

    Raises:
        UserError: the header cannot be used.
    """
    with _errors_name(path):
        return open_image(Path(path)).notes


def content_hash(path: str | Path) -> str:
    """Names the content of an image: a hash of the bytes of its file, or of both files of a pair.

    Raises:
        UserError: a file that cannot be read.
    """
    path = Path(path)
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in image_files(path):
            with file.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    return digest.hexdigest()


def read_volume(path: str | Path, axes: int, max_voxels: int, fill: float | None = None) -> RawVolume:
    """Read a volume.

    Args:
        path: any image file that nibabel reads; for an image in two files, either of them.
        axes: 3 for a volume (further axes of length 1 are dropped), 4 for a series.
        max_voxels: a header that claims more is refused before the data are decoded.
        fill: the value that NaN and infinite voxels get; they are refused when None.

    Raises:
        UserError: unreadable, truncated or too large; another number of axes; not finite; constant. Names the file and
            the remedy.
    """
    with _errors_name(path):
        image = open_image(Path(path))
        _check_shape(image.shape, max_voxels)
        shape = _without_ones(image.shape, max(axes, 3))
        if len(shape) != axes:
            raise UserError(f"has {len(shape)} axes {shape}, {_wrong_axes(Path(path), len(shape))}")
        voxels, slope, inter = image.read()
        voxels = _checked(voxels.reshape(shape, order="A"), slope, inter, fill)
        return RawVolume(voxels, slope, inter, image.affine)


@contextmanager
def _errors_name(path: str | Path) -> Iterator[None]:
    """Turn every error into a UserError that names the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # nibabel, gzip and zlib raise a dozen kinds for a damaged file
        raise UserError(f"{path}: cannot be read as an image: {_why(Path(path), error)}") from None


def _why(path: Path, error: Exception) -> str:
    """Why a file cannot be read: what it is instead of an image, or else the error."""
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        head = b""
    packed, suffix = head.startswith(b"\x1f\x8b"), path.suffix.lower()
    if head[128:] == b"DICM" or suffix in (".dcm", ".ima"):
        return "it is a DICOM file; convert the whole series to NIfTI, for example with dcm2niix"
    if packed and suffix not in (".gz", ".mgz"):
        return "its content is compressed with gzip, and its name does not say so; add .gz to the name"
    if head and not packed and suffix in (".gz", ".mgz"):
        remedy = "name it .mgh" if suffix == ".mgz" else "take .gz off the name"
        return (
            f"its name ends with {suffix}, and its content is not compressed; {remedy},"
            " or copy or convert the file anew"
        )
    return f"{type(error).__name__}: {' '.join(str(error).split())}; copy or convert the file anew"


def _wrong_axes(path: Path, axes: int) -> str:
    if axes == 4 and re.search(r"_dwi(\.\w+)*$", path.name, re.IGNORECASE):
        return (
            "raw diffusion data, and its modality has single volumes: dMRI is a scalar map such as FA or MD unless"
            " modalities.dMRI.grid has four axes; name the map instead, or set that"
        )
    kind = {3: "one volume, and its modality is a series", 4: "a series, and its modality has single volumes"}
    return f"{kind.get(axes, 'neither a volume nor a series')}; correct the modality or the file"


def _without_ones(shape: tuple[int, ...], least: int) -> tuple[int, ...]:
    while len(shape) > least and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _check_shape(shape: tuple[int, ...], max_voxels: int) -> None:
    if not shape or min(shape) < 1:
        raise UserError(f"the header claims {shape} voxels, which is none; the file is damaged")
    if prod(shape) > max_voxels:
        raise UserError(
            f"the header claims {shape} voxels, more than data.max_voxels={max_voxels}; raise it if that is true"
        )
    if max(shape[:3]) > LONGEST_AXIS:
        raise UserError(f"the header claims {shape} voxels, which no volume has; the file is damaged, or is a surface")


def _checked(voxels: np.ndarray, slope: float, inter: float, fill: float | None) -> np.ndarray:
    """The voxels, if they are finite (or there is something to put in the place of those that are not) and differ."""
    if voxels.dtype.kind in "biu" and len(np.unique(voxels.ravel("K")[::SAMPLED])) > 1 and slope:
        return voxels
    low, high = voxels.min(), voxels.max()
    if not np.isfinite(float(high) - float(low)):
        finite = np.isfinite(voxels)
        bad = voxels.size - np.count_nonzero(finite)
        if bad and fill is None:
            raise UserError(
                f"holds {bad} voxels that are NaN or infinite; mask or repair the file, or set nan: background"
                " for its modality"
            )
        if bad and fill is not None and slope:
            voxels = np.where(finite, voxels, voxels.dtype.type((fill - inter) / slope))
            low, high = voxels.min(), voxels.max()
    if low == high or not slope:
        raise UserError(f"every voxel is {float(low):g}; there is nothing to see, leave it out")
    return voxels
