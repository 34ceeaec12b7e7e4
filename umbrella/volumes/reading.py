"""Read one image file: any format of nibabel's, within a size limit, brought to RAS+ axes."""

from math import prod
from pathlib import Path

import nibabel as nib
import numpy as np

from umbrella.base import UserError


def read_volume(path: str | Path, axes: int, max_voxels: int) -> np.ndarray:
    """Read a volume in world-aligned axes.

    Args:
        path: any image file that nibabel reads.
        axes: 3 for a volume (a fourth axis of length 1 is dropped), 4 for a series.
        max_voxels: a header that claims more is refused before the data are decoded.

    Returns:
        float32, (X, Y, Z) or (X, Y, Z, T): X to the subject's right, Y to the front, Z up (RAS+, by the affine), scale
        factors applied.

    Raises:
        UserError: unreadable, truncated or too large; another number of axes; not finite; constant.
    """
    try:
        image = nib.load(path)
        shape = image.shape
        if not prod(shape):
            raise UserError(f"{path}: the header claims {shape} voxels, which is none")
        if prod(shape) > max_voxels:
            raise UserError(f"{path}: the header claims {shape} voxels, more than data.max_voxels={max_voxels}")
        if len(shape) == 4 and axes == 3 and shape[3] == 1:
            image = image.slicer[..., 0]
        if len(image.shape) != axes:
            raise UserError(f"{path}: has {len(shape)} axes {shape}, and its modality's grid has {axes}")
        voxels = np.asarray(nib.as_closest_canonical(image).dataobj, dtype=np.float32)
    except UserError:
        raise
    except Exception as error:  # nibabel, gzip and zlib raise a dozen kinds for a damaged file
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as an image: {type(error).__name__}: {reason}") from None
    if not np.isfinite(voxels).all():
        raise UserError(f"{path}: holds {np.count_nonzero(~np.isfinite(voxels))} voxels that are NaN or infinite")
    if voxels.min() == voxels.max():
        raise UserError(f"{path}: every voxel is {voxels.flat[0]:g}")
    return voxels
