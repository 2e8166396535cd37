import numpy as np
import pytest

from captionlib.data.batches.augmentation import FeatureMapAugmentation
from captionlib.errors import DatasetError


def numbered(images: int, side: int) -> np.ndarray:
    """Maps whose channels at each position are the image, the row and the column."""
    grid = np.stack(np.meshgrid(np.arange(images), np.arange(side), np.arange(side), indexing="ij"), -1)
    return grid.reshape(images, side * side, 3).astype(np.float16)


def augment(
    augmentation: FeatureMapAugmentation, side: int, size: float, images: int = 200
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the row and the column that each position comes from, and the selected images."""
    rows = np.random.default_rng(0).permutation(images)
    augmented = augmentation.apply(numbered(images, side), rows, size, np.random.default_rng(1).random((images, 3)))
    length = round(augmented.shape[1] ** 0.5)
    image, row, column = np.moveaxis(augmented.reshape(images, length, length, 3).astype(int), 3, 0)
    assert (image == rows[:, None, None]).all()
    assert (row == row[:, :, :1]).all()
    assert (column == column[:, :1, :]).all()
    return row[:, :, 0], column[:, 0, :], rows


@pytest.mark.parametrize("side", [1, 2, 7, 14])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [0.0, 0.4, 0.999])
def test_crop_is_contiguous_and_at_least_as_large_as_configured(side: int, fraction: float, size: float) -> None:
    row, column, _ = augment(FeatureMapAugmentation(random_crop=fraction), side, size)
    for indices in row, column:
        assert (np.diff(indices) == 1).all()
        assert indices.shape[1] >= fraction * side - 1
        assert (indices.min(), indices.max()) == (0, side - 1)  # crops lie anywhere
    if side == 14:
        assert len(row[0]) == round(14 * (fraction + (1 - fraction) * size))
        assert size > 0.9 or len(np.unique(row[:, 0] * side + column[:, 0])) > 3


def test_about_half_of_the_maps_are_flipped() -> None:
    row, column, _ = augment(FeatureMapAugmentation(horizontal_flip=True), 7, 0.5)
    assert (row == np.arange(7)).all()
    flipped = (column == np.arange(7)[::-1]).all(1)
    assert ((column == np.arange(7)).all(1) | flipped).all()
    assert 60 < flipped.sum() < 140


def test_flipped_crop_is_contiguous_from_right_to_left() -> None:
    row, column, _ = augment(FeatureMapAugmentation(random_crop=0.5, horizontal_flip=True), 14, 0.3)
    assert (np.diff(row) == 1).all()
    assert set(np.diff(column).flat) == {1, -1}


def test_augmentation_is_falsy_if_it_changes_nothing() -> None:
    assert not FeatureMapAugmentation()
    assert FeatureMapAugmentation(horizontal_flip=True)
    assert FeatureMapAugmentation(random_crop=0.1)


def test_rejects_maps_that_are_not_square() -> None:
    with pytest.raises(DatasetError, match=r"expect square feature maps, got 6 positions"):
        FeatureMapAugmentation(random_crop=0.5).apply(np.zeros((1, 6, 3)), np.array([0]), 0.5, np.zeros((1, 3)))
