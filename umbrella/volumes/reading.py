"""Read one image file, in any format of nibabel's, as it is stored: nothing is turned, scaled or converted here."""

import hashlib
import logging
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from deflate import DeflateError, gzip_decompress
from isal import igzip, isal_zlib
from nibabel import imageglobals
from nibabel.affines import voxel_sizes

from umbrella.base import UserError

imageglobals.logger.setLevel(logging.CRITICAL)  # what matters of a damaged header is said here, with the file
PAIRS = {".hdr", ".img", ".head", ".brik"}
"""Suffixes of images that lie in two files."""
HEADER_BYTES = 1024
GZIP = 31
"""zlib's code for a stream with gzip's header and checksum."""
SAMPLED = 4099
"""Of whole numbers every so many are looked at first: where two of them differ, the volume is not constant."""
SURPLUS = 2**20
"""Bytes that a file may have beside its voxels: header, extensions, padding. A stream far longer is not unpacked."""


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


def image_files(path: str | Path) -> list[Path]:
    """The files that an image consists of: the one that is named, or both of a pair such as .hdr and .img."""
    path = Path(path)
    if PAIRS.isdisjoint(suffix.lower() for suffix in path.suffixes[-2:]):
        return [path]
    try:
        parts = {part: Path(holder.filename) for part, holder in nib.load(path).file_map.items() if holder.filename}
        # Beside an Analyze pair there may be an affine, and mostly there is none.
        return sorted({file for part, file in parts.items() if part != "mat" or file.exists()})
    except Exception:  # reading it will say what is wrong
        return [path]


def count_axes(path: str | Path) -> int:
    """Axes of an image by its header alone: 3 of a volume, 4 of a series. Further ones of length 1 do not count.

    Raises:
        UserError: it cannot be read as an image.
    """
    try:
        shape = nib.load(path).shape
    except Exception as error:
        raise _unreadable(path, error) from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return len(shape)


def content_id(path: str | Path) -> str:
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


def read_volume(path: str | Path, axes: int, max_voxels: int) -> RawVolume:
    """Read a volume.

    Args:
        path: any image file that nibabel reads; for an image in two files, either of them.
        axes: 3 for a volume (further axes of length 1 are dropped), 4 for a series.
        max_voxels: a header that claims more is refused before the data are decoded.

    Raises:
        UserError: unreadable, truncated or too large; another number of axes; not finite; constant. Names the file and
            the remedy.
    """
    try:
        image, unpacked = _open(Path(path), max_voxels)
        _check_shape(image.shape, max_voxels)
        shape = image.shape
        while len(shape) > max(axes, 3) and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != axes:
            kind = {3: "one volume, and its modality is a series", 4: "a series, and its modality has single volumes"}
            raise UserError(
                f"has {len(shape)} axes {shape}, {kind.get(len(shape), 'neither a volume nor a series')};"
                " correct the modality or the file"
            )
        voxels, slope, inter = _stored(image, unpacked)
        affine = np.asarray(image.affine, dtype=np.float64)
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise UserError("its affine does not say where the axes point; write a proper one into the header")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # nibabel, gzip and zlib raise a dozen kinds for a damaged file
        raise _unreadable(path, error) from None
    voxels = voxels.reshape(shape, order="A")
    _check_voxels(path, voxels, slope)
    return RawVolume(voxels, slope, inter, affine)


def _unreadable(path: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"{path}: cannot be read as an image: {type(error).__name__}: {reason}; copy or convert the file anew"
    )


def _open(path: Path, max_voxels: int) -> tuple[Any, bytes | bytearray | None]:
    """The image, and its whole file where that was decompressed here (then the image itself holds the header only)."""
    if path.suffix.lower() not in (".gz", ".mgz"):
        return nib.load(path), None
    packed = path.read_bytes()
    head = isal_zlib.decompressobj(wbits=GZIP).decompress(packed[: 2**16], HEADER_BYTES)
    if path.suffix.lower() == ".mgz":
        kind = nib.MGHImage
    else:
        kind = next((k for k in (nib.Nifti1Image, nib.Nifti2Image) if k.header_class.may_contain_header(head)), None)
    if kind is None or path.name.lower().endswith(".img.gz"):
        return nib.load(path), None
    header = kind.header_class.from_fileobj(BytesIO(head))
    _check_shape(header.get_data_shape(), max_voxels)
    offset = int(header.get_data_offset())
    claimed = offset + prod(header.get_data_shape()) * header.get_data_dtype().itemsize
    unpacked = _unpack(packed, claimed)
    if len(unpacked) < claimed:
        raise EOFError(f"{len(unpacked)} bytes, and the header claims {claimed}")
    return kind.from_stream(BytesIO(unpacked[:offset])), unpacked


def _unpack(packed: bytes, claimed: int) -> bytes | bytearray:
    # The last four bytes of a gzip member say how long it is, unpacked: libdeflate wants to know, and is fastest.
    size = int.from_bytes(packed[-4:], "little")
    if claimed <= size <= claimed + SURPLUS:
        try:
            return gzip_decompress(packed, size)
        except DeflateError:
            pass
    # Several members, or damaged: this way says how.
    with igzip.GzipFile(fileobj=BytesIO(packed)) as stream:
        return stream.read(claimed + SURPLUS)


def _check_shape(shape: tuple[int, ...], max_voxels: int) -> None:
    if not shape or min(shape) < 1:
        raise UserError(f"the header claims {shape} voxels, which is none; the file is damaged")
    if prod(map(int, shape)) > max_voxels:
        raise UserError(
            f"the header claims {shape} voxels, more than data.max_voxels={max_voxels}; raise it if that is true"
        )


def _stored(image: Any, unpacked: bytes | bytearray | None) -> tuple[np.ndarray, float, float]:
    """Voxels, slope and intercept. Formats with a factor per slice or frame are scaled by nibabel."""
    data = image.dataobj
    dtype = image.get_data_dtype()
    if dtype.kind not in "biuf":
        raise UserError(f"holds {dtype} voxels, and a volume has one real number per voxel; convert the file")
    if type(data) is not nib.arrayproxy.ArrayProxy:
        return np.asanyarray(data), 1.0, 0.0
    if unpacked is None:
        return data.get_unscaled(), float(data.slope), float(data.inter)
    stored = np.frombuffer(unpacked, data.dtype, prod(data.shape), data.offset)
    return stored.reshape(data.shape, order="F"), float(data.slope), float(data.inter)


def _check_voxels(path: str | Path, voxels: np.ndarray, slope: float) -> None:
    if voxels.dtype.kind in "biu" and len(np.unique(voxels.ravel("K")[::SAMPLED])) > 1 and slope:
        return
    low, high = voxels.min(), voxels.max()
    if not np.isfinite(float(high) - float(low)):
        bad = np.count_nonzero(~np.isfinite(voxels))
        raise UserError(f"{path}: holds {bad} voxels that are NaN or infinite; mask or repair the file")
    if low == high or not slope:
        raise UserError(f"{path}: every voxel is {float(low):g}; there is nothing to see, leave it out")
