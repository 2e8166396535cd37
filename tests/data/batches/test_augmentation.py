import numpy as np
import pytest

from captionlib.data.batches.augmentation import FeatureMapAugmentation
from captionlib.errors import DatasetError


def numbered(images: int, side: int) -> np.ndarray:
    """Each position has its image, its row and its column."""
    grid = np.stack(np.meshgrid(np.arange(images), np.arange(side), np.arange(side), indexing="ij"), -1)
    return grid.reshape(images, side * side, 3).astype(np.float16)


def show(
    views: FeatureMapAugmentation, side: int, size: float, images: int = 200
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The row and the column that each position of the views was taken from, and which images are shown."""
    rows = np.random.default_rng(0).permutation(images)
    shown = views.show(numbered(images, side), rows, size, np.random.default_rng(1).random((images, 3)))
    length = round(shown.shape[1] ** 0.5)
    image, row, column = np.moveaxis(shown.reshape(images, length, length, 3).astype(int), 3, 0)
    assert (image == rows[:, None, None]).all()
    assert (row == row[:, :, :1]).all()
    assert (column == column[:, :1, :]).all()
    return row[:, :, 0], column[:, 0, :], rows


@pytest.mark.parametrize("side", [1, 2, 7, 14])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [0.0, 0.4, 0.999])
def test_a_crop_is_a_window_at_least_as_large_as_asked_for(side: int, share: float, size: float) -> None:
    row, column, _ = show(FeatureMapAugmentation(random_crop=share), side, size)
    for along in row, column:
        assert (np.diff(along) == 1).all()
        assert along.shape[1] >= share * side - 1
        assert (along.min(), along.max()) == (0, side - 1)  # windows lie anywhere
    if side == 14:
        assert len(row[0]) == round(14 * (share + (1 - share) * size))
        assert size > 0.9 or len(np.unique(row[:, 0] * side + column[:, 0])) > 3


def test_every_other_map_is_mirrored() -> None:
    row, column, _ = show(FeatureMapAugmentation(horizontal_flip=True), 7, 0.5)
    assert (row == np.arange(7)).all()
    mirrored = (column == np.arange(7)[::-1]).all(1)
    assert ((column == np.arange(7)).all(1) | mirrored).all()
    assert 60 < mirrored.sum() < 140


def test_a_mirrored_crop_is_a_window_read_from_right_to_left() -> None:
    row, column, _ = show(FeatureMapAugmentation(random_crop=0.5, horizontal_flip=True), 14, 0.3)
    assert (np.diff(row) == 1).all()
    assert set(np.diff(column).flat) == {1, -1}


def test_views_change_nothing_unless_asked_for() -> None:
    assert not FeatureMapAugmentation()
    assert FeatureMapAugmentation(horizontal_flip=True)
    assert FeatureMapAugmentation(random_crop=0.1)


def test_maps_that_are_not_square_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"expected maps of as many rows as columns .*, got 6 positions"):
        FeatureMapAugmentation(random_crop=0.5).show(np.zeros((1, 6, 3)), np.array([0]), 0.5, np.zeros((1, 3)))
