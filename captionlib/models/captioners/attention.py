"""Soft attention over a spatial feature map (Xu et al. 2015, arXiv 1502.03044), recomputed at every time step.

    a_i = max(0, Wa (x_i - mean) / std + b)     annotation vector of position i of the feature map
    s_i = a_i (Wq h + b) / sqrt(size)           score, for the hidden state h
    z   = sum_i softmax(s)_i a_i                context vector

The score is a scaled dot product (Luong et al. 2015, arXiv 1508.04025) instead of a small network, so one
matrix product computes the scores of all sentences of an image.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from captionlib.models.layers import Dropout, Standardization

__all__ = ["Attention", "ImageGroups", "group_by_image"]


class ImageGroups(NamedTuple):
    """Places rows (sentences) in a padded `[images, width]` matrix, so that one product scores all rows of an image.

    Attributes:
        slots: `[rows] int64`, the index of each row in the flattened matrix.
        width: the largest number of rows per image.
    """

    slots: Tensor
    width: int


def group_by_image(image_of_row: Tensor, images: int) -> ImageGroups:
    """Groups rows by image; `image_of_row` is `[rows] int64`, in any order, and `images` is the number of images."""
    counts = torch.bincount(image_of_row, minlength=images)
    order = image_of_row.argsort(stable=True)
    index = torch.empty_like(image_of_row)
    starts = (counts.cumsum(0) - counts)[image_of_row[order]]
    index[order] = torch.arange(len(image_of_row), device=image_of_row.device) - starts
    width = int(counts.max())
    return ImageGroups(image_of_row * width + index, width)


class Attention(nn.Module):
    """Attends to the annotation vectors of images.

    Args:
        channels: channels of the feature map.
        size: dimensions of an annotation vector.
        hidden_size: dimensions of the hidden state.
        gates: dimensions of all gates of the recurrence.
        dropout: dropout probability of the annotation vectors.
    """

    def __init__(self, channels: int, size: int, hidden_size: int, gates: int, dropout: float) -> None:
        super().__init__()
        self.standardization = Standardization(channels)
        self.annotation = nn.Linear(channels, size)
        self.query = nn.Linear(hidden_size, size)
        # The captioner adds the projected context vector to the gates, and to the hidden state that predicts the word.
        self.to_gates = nn.Linear(size, gates, bias=False)
        self.to_output = nn.Linear(size, hidden_size, bias=False)
        self.dropout = Dropout(dropout)

    def annotate(self, maps: Tensor) -> Tensor:
        """Computes annotation vectors, `[images, positions, size]`, of maps `[images, positions, channels]`."""
        annotations: Tensor = self.dropout(torch.relu(self.annotation(self.standardization(maps))))
        return annotations

    def forward(self, hidden: Tensor, annotations: Tensor, groups: ImageGroups) -> tuple[Tensor, Tensor]:
        """Attends from hidden states, `[rows, hidden_size]`, to annotation vectors, `[images, positions, size]`.

        Returns:
            Context vectors, `[rows, size]`, and attention weights, `[rows, positions] float32`, whose rows sum to 1.
        """
        images, positions, size = annotations.shape
        queries = self.query(hidden) * size**-0.5
        grouped = queries.new_zeros(images * groups.width, size).index_copy(0, groups.slots, queries)
        scores = torch.bmm(grouped.view(images, groups.width, size), annotations.transpose(1, 2))
        weights = torch.softmax(scores, 2, dtype=torch.float32)  # [images, width, positions]
        contexts = torch.bmm(weights.to(annotations.dtype), annotations).view(-1, size)
        return contexts.index_select(0, groups.slots), weights.view(-1, positions).index_select(0, groups.slots)
