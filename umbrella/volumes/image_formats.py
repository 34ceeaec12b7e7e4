"""Open an image in any nibabel format: check its header, and read its voxels as they are stored."""

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

imageglobals.logger.setLevel(logging.CRITICAL)  # this module reports damaged headers itself, with the file name
PAIRED_SUFFIXES = {".hdr", ".img", ".head", ".brik"}
"""Suffixes of images that consist of two files."""
COMPRESSED_SUFFIXES = {".gz", ".mgz", ".bz2", ".zst"}
MAX_EXTRA_BYTES = 2**24
"""Maximum number of bytes before the voxels (header, extensions), and maximum number of bytes after them."""
MAX_COMPRESSION_RATIO = 1032
"""The maximum compression ratio of deflate, which gzip and HDF5 files use."""
BLOCK_SIZE = 2**20
"""Bytes to decompress at a time."""
VOXEL_SIZE_RANGE = (1e-3, 1e3)
"""Smallest and largest valid voxel edge in millimetres."""
MAX_QUATERNION_NORM = 1.01
"""Norm up to which a deviation of a quaternion from norm 1 counts as rounding error."""
UNITS = {1: ("metres", 1e3), 3: ("micrometres", 1e-3)}
"""xyzt_units code to the unit's name and its length in millimetres. Every other code counts as millimetres."""
SPATIAL_DIMENSIONS = ("xspace", "yspace", "zspace")
"""Names of the spatial dimensions in a MINC file."""


@dataclass(frozen=True)
class OpenImage:
    """The checked header of an image, and a function that reads its voxels."""

    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray
    """(4, 4), float64; maps voxel indices to RAS+ coordinates in millimetres."""
    notes: tuple[str, ...]
    """Descriptions of unusual header fields that change how the image is read."""
    read: Callable[[], tuple[np.ndarray, float, float]]
    """Return voxels, slope and intercept."""


def image_files(path: str | Path) -> list[Path]:
    """Return the files of an image: the file itself, or both files of a pair such as .hdr and .img."""
    path = Path(path)
    if PAIRED_SUFFIXES.isdisjoint(suffix.lower() for suffix in path.suffixes[-2:]):
        return [path]
    try:
        files = {role: Path(name) for role, name in _file_map(_image_class(path), path).items()}
        # The .mat file of an Analyze image is optional.
        return sorted({file for role, file in files.items() if role != "mat" or file.exists()})
    except Exception:  # reading the image raises an error with the reason
        return [path]


def image_size(path: str | Path) -> int:
    """Return the total size of an image's files in bytes."""
    return sum(file.stat().st_size for file in image_files(path))


def open_image(path: Path) -> OpenImage:
    """Read and check the header of an image.

    Raises:
        UserError: if the image is not a volume, or its affine, voxel size or data type cannot be used.
        Exception: nibabel and the decompressors raise many types for a damaged file.
    """
    image_class = _image_class(path)
    if not issubclass(image_class, SpatialImage):
        raise UserError("is a surface or a matrix (GIFTI, CIFTI) and not a volume; leave it out")
    with np.errstate(all="ignore"):  # the checks below find overflows
        is_contiguous = issubclass(image_class, (nib.AnalyzeImage, nib.MGHImage))  # NIfTI classes derive from Analyze
        image = (_open_contiguous if is_contiguous else _open_with_nibabel)(image_class, path)
        edges = voxel_sizes(image.affine)
        # The determinant is the volume of a voxel: the product of its edges, or less if axes are oblique.
        if image.affine.shape != (4, 4) or not abs(np.linalg.det(image.affine[:3, :3])) > 1e-6 * prod(edges):
            raise UserError("its affine does not say where the axes point; write a proper one into the header")
    if not (VOXEL_SIZE_RANGE[0] <= edges.min() and edges.max() <= VOXEL_SIZE_RANGE[1]):
        size = " x ".join(f"{edge:g}" for edge in edges)
        raise UserError(
            f"the header claims voxels of {size} mm, and edges are from 1 µm to 1 m; correct their size or their unit"
        )
    if image.dtype.names:
        raise UserError("is a colour image, and a volume has one number per voxel; convert it to grey values")
    if image.dtype.kind not in "biuf":
        raise UserError(f"holds {image.dtype} voxels, and a volume has one real number per voxel; convert the file")
    return image


def _image_class(path: Path) -> Any:
    """Return the nibabel class for a file, from its name and its first bytes."""
    if not path.stat().st_size:
        raise EOFError("the file is empty")
    sniff = None
    for image_class in all_image_classes:
        is_match, sniff = image_class.path_maybe_image(str(path), sniff)
        if is_match:
            return image_class
    raise ValueError("it is in no format that nibabel knows")


def _file_map(image_class: Any, path: Path) -> dict[str, str]:
    """Return the file names of an image by role: "image", and in some formats "header" and "mat"."""
    return {role: holder.filename for role, holder in image_class.filespec_to_file_map(str(path)).items()}


def _open_contiguous(image_class: Any, path: Path) -> OpenImage:
    """Open a NIfTI, Analyze or MGH image. Its voxels are one contiguous block in Fortran order."""
    files = _file_map(image_class, path)
    with ImageOpener(files.get("header", files["image"])) as stream:
        head = stream.read(image_class.header_class.template_dtype.itemsize)
    header = image_class.header_class(head)
    shape, dtype, offset = tuple(map(int, header.get_data_shape())), header.get_data_dtype(), header.get_data_offset()
    min_offset = header.sizeof_hdr if getattr(header, "is_single", False) else 0
    if not min_offset <= offset <= MAX_EXTRA_BYTES:
        raise UserError(f"the header puts the voxels at byte {offset} (vox_offset), where none can be; convert it anew")

    def read() -> tuple[np.ndarray, float, float]:
        slope, inter = header.get_slope_inter()
        voxels = _read_voxels(Path(files["image"]), shape, dtype, offset)
        return voxels, 1.0 if slope is None else float(slope), 0.0 if inter is None else float(inter)

    notes: list[str] = []
    if issubclass(image_class, nib.Nifti1Pair):
        affine = _nifti_affine(header, notes)
    elif image_class is nib.MGHImage:
        affine = header.get_affine()
        if head[28:30] == b"\0\0":
            notes.append("orientation assumed: goodRASFlag is 0 in the header")
    else:
        affine = nib.load(path).affine  # from the .mat file, if there is one
        if not Path(files.get("mat", "")).is_file():
            notes.append("orientation assumed: an Analyze header has none")
    return OpenImage(shape, dtype, np.asarray(affine, np.float64), tuple(notes), read)


def _nifti_affine(header: Any, notes: list[str]) -> np.ndarray:
    """Return the affine of a NIfTI header in millimetres. Appends to ``notes``."""
    by_qform, by_sform = (int(header[f"{form}_code"]) > 0 for form in ("qform", "sform"))
    names = ("quatern_b", "quatern_c", "quatern_d")
    quaternion = np.array([header[name] for name in names], np.float64)
    norm = float(np.linalg.norm(quaternion))
    if by_qform and 1 + header.quaternion_threshold < norm * norm <= MAX_QUATERNION_NORM**2:
        for name, value in zip(names, quaternion / norm, strict=True):
            header[name] = value
        if not by_sform:
            notes.append("the quaternion of the qform is longer than 1 and was normalised")
    if by_qform and not by_sform and norm > MAX_QUATERNION_NORM:
        raise UserError(f"the quaternion of its qform has length {norm:g} instead of 1; write a proper one")
    affine = header.get_best_affine()
    if not by_qform and not by_sform:
        notes.append("orientation assumed: qform_code and sform_code are 0 in the header")
    if by_qform and by_sform and norm <= MAX_QUATERNION_NORM:
        qform, sform = header.get_qform()[:3, :3], affine[:3, :3]
        if np.linalg.det(qform) * np.linalg.det(sform) < 0 or (qform * sform).sum(axis=0).min() < 0:
            notes.append("orientation assumed: qform and sform contradict each other, and the sform was used")
    unit, factor = UNITS.get(int(header["xyzt_units"]) % 8, ("", 1.0))
    if unit:
        affine = np.diag([factor, factor, factor, 1.0]) @ affine
        notes.append(f"the unit in the header is {unit}, converted to millimetres")
    return affine


def _read_voxels(file: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
    """Read voxels as they are stored, after checking that the file is large enough."""
    claimed = offset + prod(shape) * dtype.itemsize
    content = _decompress(file, claimed) if file.suffix.lower() in COMPRESSED_SUFFIXES else None
    size = file.stat().st_size if content is None else len(content)
    if size < claimed:
        raise EOFError(f"{size} bytes, and the header claims {claimed}")
    if content is None:
        return np.memmap(file, dtype, "c", offset, shape, "F")
    return np.frombuffer(content, dtype, prod(shape), offset).reshape(shape, order="F")


def _decompress(file: Path, claimed: int) -> bytes | bytearray:
    """Decompress a file, up to ``claimed + MAX_EXTRA_BYTES`` bytes."""
    limit = claimed + MAX_EXTRA_BYTES
    if file.suffix.lower() in (".gz", ".mgz"):
        packed = file.read_bytes()
        # The last four bytes of a gzip member are its decompressed size. libdeflate, the fastest library, needs it.
        size = int.from_bytes(packed[-4:], "little")
        if claimed <= size <= min(limit, MAX_COMPRESSION_RATIO * len(packed)):
            try:
                return gzip_decompress(packed, size)
            except DeflateError:
                pass
        # Several members, or a damaged file: igzip reports the exact error.
        stream = igzip.GzipFile(fileobj=BytesIO(packed))
    else:
        stream = ImageOpener(file)
    content = bytearray()
    with stream:
        while block := stream.read(min(BLOCK_SIZE, limit - len(content))):
            content += block
    return content


def _open_with_nibabel(image_class: Any, path: Path) -> OpenImage:
    """Open an image of any other format. nibabel reads and scales the voxels, which may have a factor per slice."""
    image = image_class.from_filename(str(path))
    shape, dtype = tuple(map(int, image.shape)), image.get_data_dtype()
    order, notes = list(range(len(shape))), []
    if issubclass(image_class, nib.Minc1Image) and len(shape) > 3:
        names = _minc_dimensions(image_class, path)
        order = _spatial_axes_first(names, shape)
        if order != sorted(order):
            notes.append("the time axis comes first in the file and was moved last, by the names of the dimensions")

    def read() -> tuple[np.ndarray, float, float]:
        claimed, size = prod(shape) * dtype.itemsize, image_size(path)
        if claimed > MAX_COMPRESSION_RATIO * size:
            raise EOFError(f"{size} bytes, and the header claims {claimed} of voxels")
        return np.asanyarray(image.dataobj).transpose(order), 1.0, 0.0

    affine = np.asarray(image.affine, np.float64)
    return OpenImage(tuple(shape[axis] for axis in order), dtype, affine, tuple(notes), read)


def _minc_dimensions(image_class: Any, path: Path) -> list[str]:
    """Return the names of the dimensions of a MINC file, slowest first."""
    import h5py
    from scipy.io import netcdf_file

    if image_class is nib.Minc1Image:
        with ImageOpener(path) as stream, netcdf_file(stream, mmap=False) as file:
            return list(file.variables["image"].dimensions)
    with h5py.File(path) as file:
        return file["minc-2.0/image/0/image"].attrs["dimorder"].decode().split(",")


def _spatial_axes_first(names: list[str], shape: tuple[int, ...]) -> list[int]:
    """Return the axis order that moves spatial axes first, then time, then other axes of length 1, as in NIfTI."""
    used = [name for name, size in zip(names, shape, strict=True) if size > 1 or name in SPATIAL_DIMENSIONS]
    if sorted(set(used) - {"time"}) != list(SPATIAL_DIMENSIONS) or len(used) != len(set(used)):
        raise UserError(
            f"its dimensions are {', '.join(names)}, which is not space, or space and time; convert it to NIfTI"
        )
    rank = dict.fromkeys(SPATIAL_DIMENSIONS, 0) | {"time": 1}
    return sorted(range(len(names)), key=lambda axis: rank.get(names[axis], 2))
