"""Other views of spatial maps, a window or a mirror image, for models that would learn a small data set by heart."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from captionlib.errors import DatasetError

__all__ = ["FeatureMapAugmentation"]

Maps = npt.NDArray[np.floating]


@dataclass(frozen=True)
class FeatureMapAugmentation:
    """How square maps are shown; without any change as they are.

    Attributes:
        random_crop: a window with at least this share of the map's sides, another place for each map and another size for each
            batch; 0 shows the whole.
        horizontal_flip: mirror every other map.
    """

    random_crop: float = 0.0
    horizontal_flip: bool = False

    def __bool__(self) -> bool:
        return self.random_crop > 0 or self.horizontal_flip

    def show(self, maps: Maps, rows: npt.NDArray[np.int64], size: float, draws: npt.NDArray[np.float64]) -> Maps:
        """A view of each of some maps.

        Args:
            maps: `[images, positions, channels]`, of square maps.
            rows: which of them, `[any number] int64`.
            size: evenly drawn from 0 to 1: decides how large the windows are.
            draws: `[len(rows), 3]`, likewise: decide where each window is, and whether it is mirrored.

        Returns:
            `[len(rows), positions of a window, channels]`.

        Raises:
            DatasetError: the maps are not square.
        """
        side = math.isqrt(maps.shape[1])
        if side * side != maps.shape[1]:
            raise DatasetError(
                f"expected maps of as many rows as columns to crop or mirror, got {maps.shape[1]} positions; leave "
                "random_crop and horizontal_flip out"
            )
        length = max(1, round(side * (self.random_crop + (1 - self.random_crop) * size))) if self.random_crop else side
        corners = ((side - length + 1) * draws[:, :2]).astype(np.int64)
        places = corners[..., None] + np.arange(length)  # [rows, 2, length]
        if self.horizontal_flip:
            places[:, 1] = np.where(draws[:, 2:] < 0.5, places[:, 1], places[:, 1, ::-1])
        positions = side * places[:, 0, :, None] + places[:, 1, None, :]  # [rows, length, length]
        shown: Maps = maps[rows[:, None], positions.reshape(len(rows), -1)]
        return shown
