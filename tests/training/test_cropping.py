import pytest
import torch

from captionlib.errors import DatasetError
from captionlib.training.cropping import crop_maps


def numbered(images: int, side: int) -> torch.Tensor:
    """Each position has its row and its column."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([row, column], 2).flatten(0, 1).float().expand(images, -1, -1)


@pytest.mark.parametrize("side", [1, 2, 7, 14])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_crop_is_a_window_at_least_as_large_as_asked_for(side: int, share: float) -> None:
    torch.manual_seed(0)
    cropped = crop_maps(numbered(200, side), share).view(200, side, side, 2)
    rows, columns = cropped[..., 0], cropped[..., 1]
    assert (rows == rows[:, :, :1]).all()
    assert (columns == columns[:, :1, :]).all()
    for along in rows[:, :, 0], columns[:, 0, :]:
        steps = along.diff(dim=1)
        assert ((steps == 0) | (steps == 1)).all()  # in order, without gaps
        seen = along[:, -1] - along[:, 0] + 1
        assert (seen >= share * side - 1).all()
        assert seen.max() == side
    if side == 14:
        assert rows.min() == 0
        assert rows.max() == 13
        assert (rows[:, -1, 0] - rows[:, 0, 0] + 1).min() < side * (share + 0.2)


def test_each_map_gets_a_window_of_its_own_and_the_seed_decides() -> None:
    maps = numbered(50, 14)
    torch.manual_seed(1)
    first = crop_maps(maps, 0.5)
    assert len({tuple(row.flatten().tolist()) for row in first}) > 40
    torch.manual_seed(1)
    assert (crop_maps(maps, 0.5) == first).all()


def test_maps_that_are_not_square_are_refused() -> None:
    with pytest.raises(DatasetError, match="expected maps of as many rows as columns, got 6 positions"):
        crop_maps(torch.zeros(1, 6, 3), 0.5)
