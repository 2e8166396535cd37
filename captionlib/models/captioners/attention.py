"""Soft attention over a spatial map (Xu et al. 2015, arXiv 1502.03044): each word has its own look at the image.

    r_i = max(0, Wr (a_i - mean) / std + b)       a region, of each position i of the map
    s_i = r_i (Wq h + b) / sqrt(size)             how much it is to the point, for the state h
    z   = sum_i softmax(s)_i r_i                  what is seen

The score is the scaled product (Luong et al. 2015, arXiv 1508.04025) rather than a small network: the sentences of an
image are scored together, in one matrix product.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from captionlib.models.standardization import Standardization

__all__ = ["Attention", "Slots"]


class Slots(NamedTuple):
    """Where the rows that look at images stand when they are grouped by image.

    Attributes:
        place: `[rows] int64`: image * width + the row's number among those of its image.
        width: the most rows that an image has.
    """

    place: Tensor
    width: int

    def first(self, rows: int) -> "Slots":
        """Those of the first rows."""
        return Slots(self.place[:rows], self.width)


class Attention(nn.Module):
    """Looks at the annotations of images.

    Args:
        channels: of the map.
        size: numbers in a region's vector.
        hidden_size: of the state that looks.
        gates: what a look adds to, in the recurrence.
        dropout: the share of the annotations' numbers that is dropped in training.
    """

    def __init__(self, channels: int, size: int, hidden_size: int, gates: int, dropout: float) -> None:
        super().__init__()
        self.standardization = Standardization(channels)
        self.region = nn.Linear(channels, size)
        self.query = nn.Linear(hidden_size, size)
        self.to_gates = nn.Linear(size, gates, bias=False)
        self.to_output = nn.Linear(size, hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def embed(self, maps: Tensor) -> Tensor:
        """The annotations of maps, `[images, positions, channels]` to `[images, positions, size]`."""
        annotations: Tensor = self.dropout(torch.relu(self.region(self.standardization(maps))))
        return annotations

    def find_slots(self, image: Tensor, images: int) -> Slots:
        """The slots of rows that look at `image`, `[rows] int64`, of so many images; rows may come in any order."""
        counts = torch.bincount(image, minlength=images)
        order = image.argsort(stable=True)
        number = torch.empty_like(image)
        number[order] = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image[order]]
        width = int(counts.max())
        return Slots(image * width + number, width)

    def forward(self, hidden: Tensor, annotations: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Looks, a row at its own image.

        Args:
            hidden: `[rows, hidden_size]`.
            annotations: `[images, positions, size]`.
            slots: of the rows.

        Returns:
            What is seen, `[rows, size]`, and how the look is spread, `[rows, positions] float32`, adding up to 1.
        """
        images, positions, size = annotations.shape
        queries = self.query(hidden) * size**-0.5
        grouped = queries.new_zeros(images * slots.width, size).index_copy(0, slots.place, queries)
        scores = torch.bmm(grouped.view(images, slots.width, size), annotations.transpose(1, 2))
        looks = torch.softmax(scores, 2, dtype=torch.float32)
        seen = torch.bmm(looks.to(annotations.dtype), annotations).view(-1, size)
        return seen.index_select(0, slots.place), looks.view(-1, positions).index_select(0, slots.place)
