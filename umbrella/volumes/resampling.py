"""Resample a volume axis by axis: each axis is one small matrix, so resizing, cropping and padding are the same sum."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import sparse

PLANES = 4
"""Target planes made at a time."""


@lru_cache(maxsize=256)
def axis_weights(size: int, target: int, step: float) -> sparse.csr_array:
    """How the voxels of one axis make those of another with the same centre: (target, size), float32.

    Where an axis shrinks (``step`` > 1) a target voxel is the mean over its extent, so that nothing aliases; where it
    grows, it is interpolated linearly between voxel centres. What lies outside the source has no weight.

    Args:
        step: edge of a target voxel, in source voxels.
    """
    centres = (size - 1) / 2 + (np.arange(target) - (target - 1) / 2) * step
    rows, columns, weights = [], [], []
    for row, centre in enumerate(centres):
        if step > 1:
            low, high = centre + 0.5 - step / 2, centre + 0.5 + step / 2
            touched = np.arange(max(0, int(np.floor(low + 1e-9))), min(size, int(np.ceil(high - 1e-9))))
            shares = (np.minimum(high, touched + 1) - np.maximum(low, touched)) / step
        elif -0.5 <= centre <= size - 0.5:
            inside = min(max(centre, 0.0), size - 1.0)
            left = min(int(inside), max(size - 2, 0))
            touched = np.arange(left, min(left + 2, size))
            shares = 1 - np.abs(inside - touched)
        else:
            continue
        rows += [row] * len(touched)
        columns += touched.tolist()
        weights += shares.tolist()
    return sparse.csr_array((np.array(weights, np.float32), (rows, columns)), shape=(target, size))


def resample(voxels: np.ndarray, weights: Sequence[sparse.csr_array], background: float) -> np.ndarray:
    """A volume with ``weights`` applied along its axes, as the difference from the background.

    Args:
        voxels: (I, J, K), any real type and memory order.
        weights: one matrix per axis, (target, size).
        background: in the units of the voxels; what lies outside the source counts as this.

    Returns:
        float32, (targets of I, J, K), exactly 0 where only background was seen.
    """
    # Slowest axis in memory first, a few planes at a time: they stay in the processor's cache from the conversion to
    # float32 to the last product, which is most of the speed.
    order = np.argsort([-abs(stride) for stride in voxels.strides], kind="stable")
    source = voxels.transpose(order)
    slow, middle, fast = (weights[axis] for axis in order)
    to_fast = fast.toarray().T
    every_plane = sparse.kron(sparse.eye_array(PLANES, dtype=np.float32), middle, format="csr")
    result = np.empty((slow.shape[0], middle.shape[0], fast.shape[0]), np.float32)
    room = np.empty((0, *source.shape[1:]), np.float32)  # memory that is new each time costs more than the sums
    for first in range(0, len(result), PLANES):
        some = slow[first : first + PLANES]
        begin, end = (int(some.indices.min()), int(some.indices.max()) + 1) if some.nnz else (0, 1)
        if len(room) < end - begin:
            room = np.empty((end - begin, *source.shape[1:]), np.float32)
        planes = room[: end - begin]
        np.copyto(planes, source[begin:end])
        if background:
            planes -= np.float32(background)
        stack = (some[:, begin:end] @ planes.reshape(end - begin, -1)).reshape(-1, source.shape[2])
        stack = every_plane[: some.shape[0] * middle.shape[0], : len(stack)] @ stack
        result[first : first + PLANES] = (stack @ to_fast).reshape(-1, *result.shape[1:])
    return result.transpose(np.argsort(order))
