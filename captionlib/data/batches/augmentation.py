"""Random crops and horizontal flips of spatial feature maps, against overfitting on small datasets."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from captionlib.errors import DatasetError

__all__ = ["FeatureMapAugmentation"]

Maps = npt.NDArray[np.floating]


@dataclass(frozen=True)
class FeatureMapAugmentation:
    """Augments square feature maps. It is falsy if it changes nothing.

    Attributes:
        random_crop: the smallest crop, as a fraction of the sides of the map; 0 does not crop. The position varies per
            map, the size per batch.
        horizontal_flip: flip each map with probability 0.5.
    """

    random_crop: float = 0.0
    horizontal_flip: bool = False

    def __bool__(self) -> bool:
        return self.random_crop > 0 or self.horizontal_flip

    def apply(
        self, maps: Maps, rows: npt.NDArray[np.int64], crop_uniform: float, uniforms: npt.NDArray[np.float64]
    ) -> Maps:
        """Augments selected maps; returns `[selected, cropped positions, channels]`.

        Args:
            maps: `[images, positions, channels]`, square.
            rows: `[selected] int64`, the images to select.
            crop_uniform: a uniform number in [0, 1) that determines the size of the crops.
            uniforms: `[selected, 3]`, uniform numbers in [0, 1) that determine the row and the column of each crop, and
                whether it is flipped.
        """
        side = math.isqrt(maps.shape[1])
        if side * side != maps.shape[1]:
            raise DatasetError(
                f"random_crop and horizontal_flip expect square feature maps, got {maps.shape[1]} positions; leave "
                "both out"
            )
        smallest = self.random_crop or 1.0
        length = max(1, round(side * (smallest + (1 - smallest) * crop_uniform)))
        corners = ((side - length + 1) * uniforms[:, :2]).astype(np.int64)
        indices = corners[..., None] + np.arange(length)  # [selected, 2, length]
        if self.horizontal_flip:
            indices[:, 1] = np.where(uniforms[:, 2:] < 0.5, indices[:, 1], indices[:, 1, ::-1])
        positions = side * indices[:, 0, :, None] + indices[:, 1, None, :]  # [selected, length, length]
        return maps[rows[:, None], positions.reshape(len(rows), -1)]
