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

SAMPLE_STRIDE = 4099
"""Stride of the voxels in the first, fast check that an integer volume is not constant."""
MAX_AXIS_LENGTH = 2**15
"""Largest number of voxels along a spatial axis. NIfTI-1 allows 32,767."""


@dataclass(frozen=True)
class RawVolume:
    """A volume as it is stored in a file. The value of a voxel is ``slope * voxel + inter``."""

    voxels: np.ndarray
    """(I, J, K) or (I, J, K, T), any real type, in the axis order of the file."""
    slope: float
    inter: float
    affine: np.ndarray
    """(4, 4); maps voxel indices to RAS+ coordinates in millimetres."""

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel spacing along I, J, K in millimetres."""
        return tuple(float(edge) for edge in voxel_sizes(self.affine))

    @property
    def orientation(self) -> str:
        """Directions of I, J, K, such as "LIA". RAS+ is "RAS"."""
        return "".join(code or "?" for code in nib.aff2axcodes(self.affine))


def count_axes(path: str | Path) -> int:
    """Return the number of axes of an image from its header: 3 for a volume, 4 for a series.

    Trailing axes of length 1 do not count.

    Raises:
        UserError: if the file cannot be read as an image.
    """
    with _raise_with_path(path):
        return len(_drop_trailing_ones(open_image(Path(path)).shape, 3))


def header_notes(path: str | Path) -> tuple[str, ...]:
    """Describe unusual header fields that change how the image is read, such as missing orientation codes.

    Raises:
        UserError: if the header cannot be used.
    """
    with _raise_with_path(path):
        return open_image(Path(path)).notes


def content_hash(path: str | Path) -> str:
    """Return a hash of the bytes of an image's file, or of both files of a pair.

    Raises:
        UserError: if a file cannot be read.
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
        axes: expected number of axes: 3 for a volume, 4 for a series. Trailing axes of length 1 are dropped.
        max_voxels: maximum number of voxels. The header is checked before the data are decoded.
        fill: value that replaces NaN and infinite voxels. None: such voxels are an error.

    Raises:
        UserError: if the file is unreadable, truncated or too large, has another number of axes, or contains
            non-finite or constant values. Names the file and the remedy.
    """
    with _raise_with_path(path):
        image = open_image(Path(path))
        _check_shape(image.shape, max_voxels)
        shape = _drop_trailing_ones(image.shape, max(axes, 3))
        if len(shape) != axes:
            raise UserError(f"has {len(shape)} axes {shape}, {_wrong_axes_hint(Path(path), len(shape))}")
        voxels, slope, inter = image.read()
        voxels = _check_voxels(voxels.reshape(shape, order="A"), slope, inter, fill)
        return RawVolume(voxels, slope, inter, image.affine)


@contextmanager
def _raise_with_path(path: str | Path) -> Iterator[None]:
    """Convert every exception to a UserError that names the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # nibabel, gzip and zlib raise many types for a damaged file
        raise UserError(f"{path}: cannot be read as an image: {_describe_error(Path(path), error)}") from None


def _describe_error(path: Path, error: Exception) -> str:
    """Return the actual format of a file that is not an image, or else the error message."""
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


def _wrong_axes_hint(path: Path, axes: int) -> str:
    if axes == 4 and re.search(r"_dwi(\.\w+)*$", path.name, re.IGNORECASE):
        return (
            "raw diffusion data, and its modality has single volumes: dMRI is a scalar map such as FA or MD unless"
            " modalities.dMRI.grid has four axes; name the map instead, or set that"
        )
    kind = {3: "one volume, and its modality is a series", 4: "a series, and its modality has single volumes"}
    return f"{kind.get(axes, 'neither a volume nor a series')}; correct the modality or the file"


def _drop_trailing_ones(shape: tuple[int, ...], min_axes: int) -> tuple[int, ...]:
    while len(shape) > min_axes and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _check_shape(shape: tuple[int, ...], max_voxels: int) -> None:
    if not shape or min(shape) < 1:
        raise UserError(f"the header claims {shape} voxels, which is none; the file is damaged")
    if prod(shape) > max_voxels:
        raise UserError(
            f"the header claims {shape} voxels, more than data.max_voxels={max_voxels}; raise it if that is true"
        )
    if max(shape[:3]) > MAX_AXIS_LENGTH:
        raise UserError(f"the header claims {shape} voxels, which no volume has; the file is damaged, or is a surface")


def _check_voxels(voxels: np.ndarray, slope: float, inter: float, fill: float | None) -> np.ndarray:
    """Check that the voxels are finite and not constant. With ``fill``, replace NaN and infinite voxels."""
    if voxels.dtype.kind in "biu" and len(np.unique(voxels.ravel("K")[::SAMPLE_STRIDE])) > 1 and slope:
        return voxels
    low, high = voxels.min(), voxels.max()
    if not np.isfinite(float(high) - float(low)):
        finite = np.isfinite(voxels)
        num_invalid = voxels.size - np.count_nonzero(finite)
        if num_invalid and fill is None:
            raise UserError(
                f"holds {num_invalid} voxels that are NaN or infinite; mask or repair the file, or set nan: background"
                " for its modality"
            )
        if num_invalid and fill is not None and slope:
            voxels = np.where(finite, voxels, voxels.dtype.type((fill - inter) / slope))
            low, high = voxels.min(), voxels.max()
    if low == high or not slope:
        raise UserError(f"every voxel is {float(low):g}; there is nothing to see, leave it out")
    return voxels
