import numpy as np
import pytest

from captionlib.data.cropping import crop_maps
from captionlib.errors import DatasetError


def numbered(images: int, side: int) -> np.ndarray:
    """Each position has its image, its row and its column."""
    grid = np.stack(np.meshgrid(np.arange(images), np.arange(side), np.arange(side), indexing="ij"), -1)
    return grid.reshape(images, side * side, 3).astype(np.float16)


@pytest.mark.parametrize("side", [1, 2, 7, 14])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_crop_is_a_window_at_least_as_large_as_asked_for(side: int, share: float) -> None:
    rows = np.random.default_rng(0).permutation(200)
    cropped = crop_maps(numbered(200, side), rows, share, np.random.default_rng(1).random((200, 4)))
    image, row, column = np.moveaxis(cropped.reshape(200, side, side, 3).astype(int), 3, 0)
    assert (image == rows[:, None, None]).all()
    assert (row == row[:, :, :1]).all()
    assert (column == column[:, :1, :]).all()
    for along in row[:, :, 0], column[:, 0, :]:
        assert set(np.diff(along).flat) <= {0, 1}  # in order, without gaps
        seen = along[:, -1] - along[:, 0] + 1
        assert (seen >= share * side - 1).all()
        assert seen.max() == side
        if side == 14:
            assert along.min() == 0
            assert along.max() == 13
            assert seen.min() < side * (share + 0.2)


def test_maps_that_are_not_square_are_refused() -> None:
    with pytest.raises(DatasetError, match="expected maps of as many rows as columns, got 6 positions"):
        crop_maps(np.zeros((1, 6, 3)), np.array([0]), 0.5, np.zeros((1, 4)))
