"""Open an image file of any format that nibabel knows: check its header, and read its voxels as they are stored."""

import logging
from collections.abc import Callable
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
MAX_EXTRA_BYTES = 2**24
"""Bytes that a file may have before its voxels (header, extensions), and bytes that it may have after them."""
RATIO = 1032
"""Bytes that a byte of a gzip or HDF5 file becomes at most; deflate cannot do better."""
BLOCK = 2**20
"""Bytes that are unpacked at a time."""
EDGES = (1e-3, 1e3)
"""Smallest and largest edge of a voxel, in millimetres."""
LONGEST_QUATERNION = 1.01
"""Length up to which a quaternion, which should have length 1, is taken for a rounding error."""
UNITS = {1: ("metres", 1e3), 3: ("micrometres", 1e-3)}
"""Code in xyzt_units to its unit, and how many millimetres that is. All other codes count as millimetres."""
SPACE = ("xspace", "yspace", "zspace")
"""Names of the spatial dimensions of a MINC file."""


@dataclass(frozen=True)
class OpenImage:
    """The header of an image, and a function that reads its voxels, their slope and their intercept."""

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


def open_image(path: Path) -> OpenImage:
    """Read and check the header of an image.

    Raises:
        UserError: it is no volume; its affine, voxel size or data type cannot be used.
        Exception: nibabel and the decompressors raise many kinds for a damaged file.
    """
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


def _format(path: Path) -> Any:
    """The nibabel class that reads a file, chosen by the name and the first bytes of the file."""
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


def _open_simple(kind: Any, path: Path) -> OpenImage:
    """An image whose voxels lie in one piece in the order of Fortran: NIfTI, Analyze and MGH."""
    files = _parts(kind, path)
    with ImageOpener(files.get("header", files["image"])) as stream:
        head = stream.read(kind.header_class.template_dtype.itemsize)
    header = kind.header_class(head)
    shape, dtype, offset = tuple(map(int, header.get_data_shape())), header.get_data_dtype(), header.get_data_offset()
    least = header.sizeof_hdr if getattr(header, "is_single", False) else 0
    if not least <= offset <= MAX_EXTRA_BYTES:
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
    return OpenImage(shape, dtype, np.asarray(affine, np.float64), tuple(notes), read)


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
    """The content of a compressed file, of which no more than ``claimed + MAX_EXTRA_BYTES`` bytes are unpacked."""
    limit = claimed + MAX_EXTRA_BYTES
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


def _open_other(kind: Any, path: Path) -> OpenImage:
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
    return OpenImage(tuple(shape[axis] for axis in order), dtype, affine, tuple(notes), read)


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
