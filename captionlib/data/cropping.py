"""Windows of spatial maps: other views of an image, for models that would learn a small data set by heart."""

import math

import numpy as np
import numpy.typing as npt

from captionlib.errors import DatasetError

__all__ = ["crop_maps"]

Maps = npt.NDArray[np.floating]


def crop_maps(maps: Maps, rows: npt.NDArray[np.int64], share: float, draws: npt.NDArray[np.float64]) -> Maps:
    """A window of each of some maps, enlarged to the size of the map: each position takes the nearest of the window.

    Args:
        maps: `[images, positions, channels]`, of square maps.
        rows: which of them, `[any number] int64`.
        share: the least that a window has of each side, above 0.
        draws: `[len(rows), 4]`, evenly drawn from 0 to 1: they decide how high, how wide and where each window is.

    Returns:
        `[len(rows), positions, channels]`.

    Raises:
        DatasetError: the maps are not square.
    """
    side = math.isqrt(maps.shape[1])
    if side * side != maps.shape[1]:
        raise DatasetError(
            f"crop: expected maps of as many rows as columns, got {maps.shape[1]} positions; set crop to 0"
        )
    sizes = share + (1 - share) * draws[:, :2]  # of the sides of the image
    starts = (1 - sizes) * draws[:, 2:]
    centres = (np.arange(side) + 0.5) / side
    places = np.minimum((starts[..., None] + sizes[..., None] * centres) * side, side - 1).astype(np.int64)
    positions = side * places[:, 0, :, None] + places[:, 1, None, :]  # [rows, side, side]
    cropped: Maps = maps[rows[:, None], positions.reshape(len(rows), -1)]
    return cropped
