"""Parts of spatial maps, for captioners that would learn the images of a small data set by heart."""

import math

import torch
from torch import Tensor

from captionlib.errors import DatasetError

__all__ = ["crop_maps"]


def crop_maps(maps: Tensor, share: float) -> Tensor:
    """A window of each map, drawn by PyTorch's global generator and enlarged to the size of the map.

    Every position takes the nearest one of the window.

    Args:
        maps: `[images, positions, channels]`, of square maps.
        share: the least that a window has of each side, above 0.

    Raises:
        DatasetError: the maps are not square.
    """
    images, positions, _ = maps.shape
    side = math.isqrt(positions)
    if side * side != positions:
        raise DatasetError(f"crop: expected maps of as many rows as columns, got {positions} positions; set crop to 0")
    sizes = share + (1 - share) * torch.rand(2, images, 1)  # of the sides of the image
    starts = (1 - sizes) * torch.rand(2, images, 1)
    centres = (torch.arange(side) + 0.5) / side
    row, column = ((starts + sizes * centres) * side).long().clamp(max=side - 1)  # [images, side] each
    chosen = (side * row[:, :, None] + column[:, None, :]).flatten(1).to(maps.device)
    return maps[torch.arange(images, device=maps.device)[:, None], chosen]
