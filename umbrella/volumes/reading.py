"""Read one image file, in any format of nibabel's, as it is stored: nothing is turned, scaled or converted here.

The header is checked first. What it claims is compared with the size of the file before memory is allocated for it.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from deflate import DeflateError, gzip_decompress
from isal import igzip
from nibabel import imageglobals
from nibabel.affines import voxel_sizes
from nibabel.imageclasses import all_image_classes
from nibabel.openers import ImageOpener
from nibabel.spatialimages import SpatialImage

from umbrella.base import UserError

imageglobals.logger.setLevel(logging.CRITICAL)  # what matters of a damaged header is said here, with the file
PAIRS = {".hdr", ".img", ".head", ".brik"}
"""Suffixes of images that lie in two files."""
COMPRESSED = {".gz", ".mgz", ".bz2", ".zst"}
SAMPLED = 4099
"""Of whole numbers every so many are looked at first: where two of them differ, the volume is not constant."""
SURPLUS = 2**24
"""Bytes that a file may have before its voxels (header, extensions), and bytes that it may have after them."""
RATIO = 1032
"""Bytes that a byte of a gzip or HDF5 file becomes at most; deflate cannot do better."""
BLOCK = 2**20
"""Bytes that are unpacked at a time."""
LONGEST_AXIS = 2**15
"""Voxels along an axis of space, at most. NIfTI-1 allows 32,767."""
EDGES = (1e-3, 1e3)
"""Smallest and largest edge of a voxel, in millimetres."""
LONGEST_QUATERNION = 1.01
"""Length up to which a quaternion, which should have length 1, is taken for a rounding error."""
UNITS = {1: ("metres", 1e3), 3: ("micrometres", 1e-3)}
"""Code in xyzt_units to its unit, and how many millimetres that is. All other codes count as millimetres."""
SPACE = ("xspace", "yspace", "zspace")
"""Names of the spatial dimensions of a MINC file."""


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


@dataclass(frozen=True)
class _Image:
    """What the header of an image says, and a function that reads the voxels, their slope and their intercept."""

    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray
    notes: tuple[str, ...]
    read: Callable[[], tuple[np.ndarray, float, float]]


def image_files(path: str | Path) -> list[Path]:
    """The files that an image consists of: the one that is named, or both of a pair such as .hdr and .img."""
    path = Path(path)
    if PAIRS.isdisjoint(suffix.lower() for suffix in path.suffixes[-2:]):
        return [path]
    try:
        parts = {part: Path(name) for part, name in _parts(_format(path), path).items()}
        # Beside an Analyze pair there may be an affine, and mostly there is none.
        return sorted({file for part, file in parts.items() if part != "mat" or file.exists()})
    except Exception:  # reading it will say what is wrong
        return [path]


def image_size(path: str | Path) -> int:
    """Bytes of the files of an image."""
    return sum(file.stat().st_size for file in image_files(path))


def count_axes(path: str | Path) -> int:
    """Axes of an image by its header alone: 3 of a volume, 4 of a series. Further ones of length 1 do not count.

    Raises:
        UserError: it cannot be read as an image.
    """
    with _errors_name(path):
        return len(_without_ones(_open(Path(path)).shape, 3))


def header_notes(path: str | Path) -> tuple[str, ...]:
    """What is unusual in the header of an image, and changes how the image is read: a phrase for each.

    Raises:
        UserError: the header cannot be used.
    """
    with _errors_name(path):
        return _open(Path(path)).notes


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
        image = _open(Path(path))
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


def _format(path: Path) -> Any:
    """The class of nibabel's that reads a file, told by its name and its first bytes."""
    if not path.stat().st_size:
        raise EOFError("the file is empty")
    sniff = None
    for kind in all_image_classes:
        fits, sniff = kind.path_maybe_image(str(path), sniff)
        if fits:
            return kind
    raise ValueError("it is in no format that nibabel knows")


def _parts(kind: Any, path: Path) -> dict[str, str]:
    """Role to name of the files of an image: "image", and for some formats "header" and "mat"."""
    return {part: holder.filename for part, holder in kind.filespec_to_file_map(str(path)).items()}


def _open(path: Path) -> _Image:
    """Read and check the header of an image."""
    kind = _format(path)
    if not issubclass(kind, SpatialImage):
        raise UserError("is a surface or a matrix (GIFTI, CIFTI) and not a volume; leave it out")
    with np.errstate(all="ignore"):  # what overflows is found below
        simple = issubclass(kind, (nib.AnalyzeImage, nib.MGHImage))  # NIfTI is a kind of Analyze
        image = _open_simple(kind, path) if simple else _open_other(kind, path)
        edges = voxel_sizes(image.affine)
        # The volume of a voxel is that of a box of its edges, less where the axes are oblique to each other.
        if image.affine.shape != (4, 4) or not abs(np.linalg.det(image.affine[:3, :3])) > 1e-6 * prod(edges):
            raise UserError("its affine does not say where the axes point; write a proper one into the header")
    if not (EDGES[0] <= edges.min() and edges.max() <= EDGES[1]):
        said = " x ".join(f"{edge:g}" for edge in edges)
        raise UserError(
            f"the header claims voxels of {said} mm, and edges are from 1 µm to 1 m; correct their size or their unit"
        )
    if image.dtype.names:
        raise UserError("is a colour image, and a volume has one number per voxel; convert it to grey values")
    if image.dtype.kind not in "biuf":
        raise UserError(f"holds {image.dtype} voxels, and a volume has one real number per voxel; convert the file")
    return image


def _open_simple(kind: Any, path: Path) -> _Image:
    """An image whose voxels lie in one piece in the order of Fortran: NIfTI, Analyze and MGH."""
    files = _parts(kind, path)
    with ImageOpener(files.get("header", files["image"])) as stream:
        head = stream.read(kind.header_class.template_dtype.itemsize)
    header = kind.header_class(head)
    shape, dtype, offset = tuple(map(int, header.get_data_shape())), header.get_data_dtype(), header.get_data_offset()
    least = header.sizeof_hdr if getattr(header, "is_single", False) else 0
    if not least <= offset <= SURPLUS:
        raise UserError(f"the header puts the voxels at byte {offset} (vox_offset), where none can be; convert it anew")

    def read() -> tuple[np.ndarray, float, float]:
        slope, inter = header.get_slope_inter()
        voxels = _voxels(Path(files["image"]), shape, dtype, offset)
        return voxels, 1.0 if slope is None else float(slope), 0.0 if inter is None else float(inter)

    notes: list[str] = []
    if issubclass(kind, nib.Nifti1Pair):
        affine = _nifti_affine(header, notes)
    elif kind is nib.MGHImage:
        affine = header.get_affine()
        if head[28:30] == b"\0\0":
            notes.append("orientation assumed: goodRASFlag is 0 in the header")
    else:
        affine = nib.load(path).affine  # that of the .mat file, where there is one
        if not Path(files.get("mat", "")).is_file():
            notes.append("orientation assumed: an Analyze header has none")
    return _Image(shape, dtype, np.asarray(affine, np.float64), tuple(notes), read)


def _nifti_affine(header: Any, notes: list[str]) -> np.ndarray:
    """The affine of a NIfTI header in millimetres. Adds to the notes."""
    by_qform, by_sform = (int(header[f"{form}_code"]) > 0 for form in ("qform", "sform"))
    names = ("quatern_b", "quatern_c", "quatern_d")
    quaternion = np.array([header[name] for name in names], np.float64)
    length = float(np.linalg.norm(quaternion))
    if by_qform and 1 + header.quaternion_threshold < length * length <= LONGEST_QUATERNION**2:
        for name, value in zip(names, quaternion / length, strict=True):
            header[name] = value
        if not by_sform:
            notes.append("the quaternion of the qform is longer than 1 and was normalised")
    if by_qform and not by_sform and length > LONGEST_QUATERNION:
        raise UserError(f"the quaternion of its qform has length {length:g} instead of 1; write a proper one")
    affine = header.get_best_affine()
    if not by_qform and not by_sform:
        notes.append("orientation assumed: qform_code and sform_code are 0 in the header")
    if by_qform and by_sform and length <= LONGEST_QUATERNION:
        one, other = header.get_qform()[:3, :3], affine[:3, :3]
        if np.linalg.det(one) * np.linalg.det(other) < 0 or (one * other).sum(axis=0).min() < 0:
            notes.append("orientation assumed: qform and sform contradict each other, and the sform was used")
    unit, factor = UNITS.get(int(header["xyzt_units"]) % 8, ("", 1.0))
    if unit:
        affine = np.diag([factor, factor, factor, 1.0]) @ affine
        notes.append(f"the unit in the header is {unit}, converted to millimetres")
    return affine


def _voxels(file: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
    """Voxels as they are stored, after the file was found to be large enough."""
    claimed = offset + prod(shape) * dtype.itemsize
    content = _unpack(file, claimed) if file.suffix.lower() in COMPRESSED else None
    size = file.stat().st_size if content is None else len(content)
    if size < claimed:
        raise EOFError(f"{size} bytes, and the header claims {claimed}")
    if content is None:
        return np.memmap(file, dtype, "c", offset, shape, "F")
    return np.frombuffer(content, dtype, prod(shape), offset).reshape(shape, order="F")


def _unpack(file: Path, claimed: int) -> bytes | bytearray:
    """The content of a compressed file, of which no more than ``claimed + SURPLUS`` bytes are unpacked."""
    limit = claimed + SURPLUS
    if file.suffix.lower() in (".gz", ".mgz"):
        packed = file.read_bytes()
        # The last four bytes of a gzip member say how long it is, unpacked: libdeflate wants to know, and is fastest.
        size = int.from_bytes(packed[-4:], "little")
        if claimed <= size <= min(limit, RATIO * len(packed)):
            try:
                return gzip_decompress(packed, size)
            except DeflateError:
                pass
        # Several members, or damaged: this way says how.
        stream = igzip.GzipFile(fileobj=BytesIO(packed))
    else:
        stream = ImageOpener(file)
    content = bytearray()
    with stream:
        while block := stream.read(min(BLOCK, limit - len(content))):
            content += block
    return content


def _open_other(kind: Any, path: Path) -> _Image:
    """An image of any other format. nibabel reads and scales its voxels, also where each slice has its own factor."""
    image = kind.from_filename(str(path))
    shape, dtype = tuple(map(int, image.shape)), image.get_data_dtype()
    order, notes = list(range(len(shape))), []
    if issubclass(kind, nib.Minc1Image) and len(shape) > 3:
        names = _minc_dimensions(kind, path)
        order = _space_first(names, shape)
        if order != sorted(order):
            notes.append("the time axis comes first in the file and was moved last, by the names of the dimensions")

    def read() -> tuple[np.ndarray, float, float]:
        claimed, size = prod(shape) * dtype.itemsize, image_size(path)
        if claimed > RATIO * size:
            raise EOFError(f"{size} bytes, and the header claims {claimed} of voxels")
        return np.asanyarray(image.dataobj).transpose(order), 1.0, 0.0

    affine = np.asarray(image.affine, np.float64)
    return _Image(tuple(shape[axis] for axis in order), dtype, affine, tuple(notes), read)


def _minc_dimensions(kind: Any, path: Path) -> list[str]:
    """Names of the dimensions of a MINC file, slowest first."""
    import h5py
    from scipy.io import netcdf_file

    if kind is nib.Minc1Image:
        with ImageOpener(path) as stream, netcdf_file(stream, mmap=False) as file:
            return list(file.variables["image"].dimensions)
    with h5py.File(path) as file:
        return file["minc-2.0/image/0/image"].attrs["dimorder"].decode().split(",")


def _space_first(names: list[str], shape: tuple[int, ...]) -> list[int]:
    """The axes of a MINC file in the order of NIfTI: those of space, as they are; time; others of length 1."""
    long = [name for name, size in zip(names, shape, strict=True) if size > 1 or name in SPACE]
    if sorted(set(long) - {"time"}) != list(SPACE) or len(long) != len(set(long)):
        raise UserError(
            f"its dimensions are {', '.join(names)}, which is not space, or space and time; convert it to NIfTI"
        )
    rank = dict.fromkeys(SPACE, 0) | {"time": 1}
    return sorted(range(len(names)), key=lambda axis: rank.get(names[axis], 2))


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
