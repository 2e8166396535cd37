"""Augments spatial feature maps by random crops and horizontal flips, to reduce overfitting on small datasets."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from captionlib.errors import DatasetError

__all__ = ["FeatureMapAugmentation"]

FeatureMaps = npt.NDArray[np.floating]


@dataclass(frozen=True)
class FeatureMapAugmentation:
    """Augments square feature maps. False in a boolean context if neither augmentation is enabled.

    The size of the crops is sampled once per batch, and the position once per feature map.
    """

    random_crop: float = 0.0  # minimum side of a crop, as a fraction of the side of the map; 0 disables cropping
    horizontal_flip: bool = False  # flip each feature map with probability 0.5

    def __bool__(self) -> bool:
        return self.random_crop > 0 or self.horizontal_flip

    def apply(
        self, maps: FeatureMaps, selected: npt.NDArray[np.int64], crop_uniform: float, uniforms: npt.NDArray[np.float64]
    ) -> FeatureMaps:
        """Returns augmented feature maps, `[selected, cropped positions, channels]`.

        Args:
            maps: feature maps `[images, positions, channels]`; the positions form a square grid.
            selected: `[selected] int64`, indices of the feature maps to augment.
            crop_uniform: random number from [0, 1) that determines the crop size.
            uniforms: `[selected, 3]` random numbers from [0, 1). The first two determine the position of a crop, and
                the last one determines whether to flip it.
        """
        side = math.isqrt(maps.shape[1])
        if side * side != maps.shape[1]:
            raise DatasetError(
                f"random_crop and horizontal_flip expect square feature maps, got {maps.shape[1]} positions; omit "
                "both options"
            )
        min_fraction = self.random_crop or 1.0
        crop_side = max(1, round(side * (min_fraction + (1 - min_fraction) * crop_uniform)))
        corners = ((side - crop_side + 1) * uniforms[:, :2]).astype(np.int64)
        indices = corners[..., None] + np.arange(crop_side)  # [selected, 2, crop_side]: rows and columns of the map
        if self.horizontal_flip:
            indices[:, 1] = np.where(uniforms[:, 2:] < 0.5, indices[:, 1], indices[:, 1, ::-1])
        positions = side * indices[:, 0, :, None] + indices[:, 1, None, :]  # [selected, crop_side, crop_side]
        return maps[selected[:, None], positions.reshape(len(selected), -1)]
