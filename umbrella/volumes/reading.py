"""Read an image file of any nibabel format as it is stored, without reorientation, scaling or conversion.

The header is checked first: the size that it states is compared with the size of the file before memory is allocated.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

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
CONTIGUOUS = (nib.AnalyzeImage, nib.MGHImage)
"""Classes of images whose voxels are one block of a file. Those of NIfTI derive from Analyze."""
COMPRESSED_SUFFIXES = {".gz", ".mgz", ".bz2", ".zst"}
MAX_EXTRA_BYTES = 2**24
"""Maximum number of bytes before the voxels (header, extensions), and maximum number of bytes after them."""
MAX_COMPRESSION_RATIO = 1032
"""The maximum compression ratio of deflate, which gzip and HDF5 files use."""
BLOCK_SIZE = 2**20
"""Bytes to decompress at a time."""
MAX_AXIS_LENGTH = 2**15
"""Largest number of voxels along a spatial axis. NIfTI-1 allows 32,767."""
MAX_QUATERNION_NORM = 1.01
"""Norm up to which a deviation of a quaternion from norm 1 counts as rounding error."""
UNITS = {1: ("metres", 1e3), 3: ("micrometres", 1e-3)}
"""xyzt_units code to the unit's name and its length in millimetres. Every other code counts as millimetres."""
SAMPLE_STRIDE = 4099
"""Stride of the voxels in the first, fast check that an integer volume is not constant."""


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


Image: TypeAlias = "str | Path | SpatialImage"
"""The file of an image, or an image of nibabel in memory."""


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


def read_volume(source: Image, axes: int, max_voxels: int, fill: float | None = None) -> RawVolume:
    """Read a volume.

    Args:
        source: an image, or any image file that nibabel reads; for an image in two files, either of them.
        axes: expected number of axes: 3 for a volume, 4 for a series. Trailing axes of length 1 are dropped.
        max_voxels: maximum number of voxels. The header is checked before the data are decoded.
        fill: value that replaces NaN and infinite voxels. None: such voxels are an error.

    Raises:
        UserError: if the file is unreadable, truncated or too large, has another number of axes, or contains
            non-finite or constant values. Names the file and the remedy.
    """
    with _open_image(source) as image:
        claims = f"the header claims {image.shape} voxels"
        if not image.shape or min(image.shape) < 1:
            raise UserError(f"{claims}, which is none; the file is damaged")
        if prod(image.shape) > max_voxels:
            raise UserError(f"{claims}, more than data.max_voxels={max_voxels}; raise it if that is true")
        if max(image.shape[:3]) > MAX_AXIS_LENGTH:
            raise UserError(f"{claims}, which no volume has; the file is damaged, or is a surface")
        shape = _drop_trailing_ones(image.shape, axes)
        if len(shape) != axes:
            raise UserError(f"has {len(shape)} axes {shape}, {_describe_axes(image_name(source), len(shape))}")
        voxels, slope, inter = image.read()
        voxels = _check_voxels(voxels.reshape(shape, order="A"), slope, inter, fill)
        return RawVolume(voxels, slope, inter, image.affine)


def image_shape(source: Image) -> tuple[int, ...]:
    """Return the shape of an image from its header: three axes, or four of a series."""
    with _open_image(source) as image:
        return _drop_trailing_ones(image.shape, 3)


def header_notes(path: str | Path) -> tuple[str, ...]:
    """Describe unusual header fields that change how the image is read, such as missing orientation codes."""
    with _open_image(path) as image:
        return image.notes


def image_files(path: str | Path) -> list[Path]:
    """Return the files of an image: the file itself, or both files of a pair such as .hdr and .img."""
    path = Path(path)
    if PAIRED_SUFFIXES.isdisjoint(suffix.lower() for suffix in path.suffixes[-2:]):
        return [path]
    try:
        files = _image_class(path).filespec_to_file_map(str(path))
        names = {Path(holder.filename): role for role, holder in files.items()}
        return sorted(file for file, role in names.items() if role != "mat" or file.exists())  # .mat is optional
    except Exception:  # reading the image raises an error with the reason
        return [path]


def image_size(path: str | Path) -> int:
    """Return the total size of an image's files in bytes."""
    return sum(file.stat().st_size for file in image_files(path))


def image_name(source: Image) -> str:
    """Return the path of an image, which an image in memory has if it was loaded from a file."""
    return (source.get_filename() or "image in memory") if isinstance(source, SpatialImage) else str(source)


@contextmanager
def _open_image(source: Image) -> Iterator[OpenImage]:
    """Read and check the header of an image. Every exception becomes a UserError that names the file."""
    name = image_name(source)
    try:
        yield _check_header(source if isinstance(source, SpatialImage) else Path(source))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # nibabel, gzip and zlib raise many types for a damaged file
        raise UserError(f"{name}: cannot be read as an image: {_describe_error(Path(name), error)}") from None


def _check_header(source: Path | SpatialImage) -> OpenImage:
    image_class = type(source) if isinstance(source, SpatialImage) else _image_class(source)
    if not issubclass(image_class, SpatialImage):
        raise UserError("is a surface or a matrix (GIFTI, CIFTI) and not a volume; leave it out")
    with np.errstate(all="ignore"):  # the checks below find overflows
        opener = _open_contiguous if issubclass(image_class, CONTIGUOUS) else _open_with_nibabel
        image = _open_in_memory(source) if isinstance(source, SpatialImage) else opener(image_class, source)
        edges = voxel_sizes(image.affine)
        # The determinant is the volume of a voxel: the product of its edges, or less if axes are oblique.
        if image.affine.shape != (4, 4) or not abs(np.linalg.det(image.affine[:3, :3])) > 1e-6 * prod(edges):
            raise UserError("its affine does not say where the axes point; write a proper one into the header")
    if not (edges.min() >= 1e-3 and edges.max() <= 1e3):
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


def _open_contiguous(image_class: Any, path: Path) -> OpenImage:
    """Open a NIfTI, Analyze or MGH image. Its voxels are one contiguous block in Fortran order."""
    files = {role: Path(holder.filename) for role, holder in image_class.filespec_to_file_map(str(path)).items()}
    with ImageOpener(files.get("header", files["image"])) as stream:
        head = stream.read(image_class.header_class.template_dtype.itemsize)
    header = image_class.header_class(head)
    shape, dtype, offset = tuple(map(int, header.get_data_shape())), header.get_data_dtype(), header.get_data_offset()
    min_offset = header.sizeof_hdr if getattr(header, "is_single", False) else 0
    if not min_offset <= offset <= MAX_EXTRA_BYTES:
        raise UserError(f"the header puts the voxels at byte {offset} (vox_offset), where none can be; convert it anew")

    def read() -> tuple[np.ndarray, float, float]:
        slope, inter = header.get_slope_inter()
        voxels = _read_voxels(files["image"], shape, dtype, offset)
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
        if "mat" not in files or not files["mat"].is_file():
            notes.append("orientation assumed: an Analyze header has none")
    return OpenImage(shape, dtype, np.asarray(affine, np.float64), tuple(notes), read)


def _nifti_affine(header: Any, notes: list[str]) -> np.ndarray:
    """Return the affine of a NIfTI header in millimetres. Appends to ``notes``."""
    by_qform, by_sform = (int(header[f"{form}_code"]) > 0 for form in ("qform", "sform"))
    names = ("quatern_b", "quatern_c", "quatern_d")
    quaternion = np.array([header[name] for name in names], np.float64)
    norm = float(np.linalg.norm(quaternion))
    if not norm <= MAX_QUATERNION_NORM:
        if by_qform and not by_sform:
            raise UserError(f"the quaternion of its qform has length {norm:g} instead of 1; write a proper one")
        by_qform = False
    if by_qform and norm * norm > 1 + header.quaternion_threshold:
        for name, value in zip(names, quaternion / norm, strict=True):
            header[name] = value
        if not by_sform:
            notes.append("the quaternion of the qform is longer than 1 and was normalised")
    affine = header.get_best_affine()
    if not by_qform and not by_sform:
        notes.append("orientation assumed: qform_code and sform_code are 0 in the header")
    if by_qform and by_sform:
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


def _open_in_memory(image: SpatialImage) -> OpenImage:
    """Open an image of nibabel. An image that was loaded from a file has the voxels and the scaling of the file."""
    if isinstance(image, nib.Minc1Image) and len(image.shape) > 3:
        raise UserError("is a series in MINC, whose axes only the file names; give its path")
    data, affine, notes = image.dataobj, image.affine, list[str]()
    if isinstance(image, nib.Nifti1Pair):  # a new image has a header that agrees with its affine
        affine = _nifti_affine(type(image)(data, affine, image.header).header, notes)

    def read() -> tuple[np.ndarray, float, float]:
        if isinstance(image, CONTIGUOUS) and nib.is_proxy(data):
            return data.get_unscaled(), float(data.slope), float(data.inter)
        return np.asfortranarray(data), 1.0, 0.0  # as in a file: the memory order decides about the rounding

    return OpenImage(tuple(map(int, image.shape)), data.dtype, np.asarray(affine, np.float64), tuple(notes), read)


def _open_with_nibabel(image_class: Any, path: Path) -> OpenImage:
    """Open an image of any other format. nibabel reads and scales the voxels, which may have a factor per slice."""
    image = image_class.from_filename(str(path))
    shape, dtype = tuple(map(int, image.shape)), image.get_data_dtype()
    order, notes = list(range(len(shape))), []
    if issubclass(image_class, nib.Minc1Image) and len(shape) > 3:
        names = _minc_dimensions(image_class, path)
        if sorted(names) != ["time", "xspace", "yspace", "zspace"]:
            raise UserError(
                f"its dimensions are {', '.join(names)}, which is not space, or space and time; convert it to NIfTI"
            )
        order.sort(key=lambda axis: names[axis] == "time")
        if names[-1] != "time":
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


def _describe_axes(path: str, axes: int) -> str:
    if axes == 4 and re.search(r"_dwi(\.\w+)*$", path, re.IGNORECASE):
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


def _check_voxels(voxels: np.ndarray, slope: float, inter: float, fill: float | None) -> np.ndarray:
    """Check that the voxels are finite and not constant. With ``fill``, replace NaN and infinite voxels."""
    if voxels.dtype.kind in "biu" and len(np.unique(voxels.ravel("K")[::SAMPLE_STRIDE])) > 1:
        return voxels
    low, high = voxels.min(), voxels.max()
    if not np.isfinite(float(high) - float(low)) and not (finite := np.isfinite(voxels)).all():
        if fill is None:
            raise UserError(
                f"holds {np.count_nonzero(~finite)} voxels that are NaN or infinite; mask or repair the file, or set"
                " nan: background for its modality"
            )
        voxels = np.where(finite, voxels, voxels.dtype.type((fill - inter) / slope))
        low, high = voxels.min(), voxels.max()
    if low == high:
        raise UserError(f"every voxel is {float(low):g}; there is nothing to see, leave it out")
    return voxels
