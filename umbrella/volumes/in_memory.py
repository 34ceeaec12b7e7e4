"""Images that are given as nibabel images or arrays, instead of files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from nibabel.spatialimages import SpatialImage
from pydantic import Field

from umbrella.base import UserError
from umbrella.conversations.formats import volume_file
from umbrella.conversations.schema import ImageItem
from umbrella.modality import Modality
from umbrella.volumes.reading import Image, image_name
from umbrella.volumes.store import prepare

Volume: TypeAlias = "Image | tuple[np.ndarray, np.ndarray]"
"""A file, an image of nibabel, or an array (X, Y, Z) or (X, Y, Z, T) and its affine (4, 4)."""
Volumes: TypeAlias = "Volume | Sequence[Volume]"
"""One volume, or several in reading order."""


class ImageInMemory(ImageItem):
    """An image that is in no file."""

    voxels: Any = Field(exclude=True, repr=False)
    """Prepared for its modality, see ``prepare``."""


def as_images(volumes: Volumes) -> list[Image]:
    """Return absolute paths and images of nibabel.

    Raises:
        UserError: a file does not exist, an affine is not (4, 4), or a volume is something else.
    """
    several: Any = [volumes] if isinstance(volumes, str | Path | SpatialImage) or _is_array(volumes) else volumes
    return [_as_image(volume) for volume in several]


def make_item(image: Image, name: str, modality: Modality, max_voxels: int) -> ImageItem:
    """Make the item of a file, or of an image in memory, which is prepared. ``name``: of the modality."""
    values: dict[str, Any] = {"type": "image", "modality": name, "image_path": image_name(image)}
    if not isinstance(image, SpatialImage):
        return ImageItem(**values)
    return ImageInMemory(**values, voxels=prepare(image, modality, max_voxels))


def _is_array(volume: Any) -> bool:
    return isinstance(volume, tuple) and len(volume) == 2 and isinstance(volume[0], np.ndarray)


def _as_image(volume: Any) -> Image:
    if isinstance(volume, str | Path):
        return volume_file(volume)
    if _is_array(volume) and np.shape(volume[1]) == (4, 4):
        return SpatialImage(*volume)
    if isinstance(volume, SpatialImage):
        return volume
    what = f"an affine of shape {np.shape(volume[1])}" if _is_array(volume) else type(volume).__name__
    raise UserError(f"a volume is a path, an image of nibabel, or a pair of array and affine (4, 4); this is {what}")
