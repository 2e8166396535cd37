"""Standardization of features to mean 0 and standard deviation 1."""

import torch
from torch import Tensor, nn

__all__ = ["Standardization"]


class Standardization(nn.Module):
    """(x - mean) / std with the statistics of the training images; the identity until they are set.

    Args:
        size: the number of features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets the statistics, `[size]` each; features that are constant in training become 0."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, features: Tensor) -> Tensor:
        """Standardizes `[..., size]`."""
        return (features - self.mean) / self.std
