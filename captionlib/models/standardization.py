"""Standardization of features to mean 0 and standard deviation 1."""

import torch
from torch import Tensor, nn

__all__ = ["Standardization"]


class Standardization(nn.Module):
    """Computes (x - mean) / std with statistics of the training images, which `set_statistics` sets.

    Until then, it returns x unchanged.

    Args:
        size: dimensions of a feature vector.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets the statistics, `[size]` each. A dimension that is constant in training is not scaled."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, features: Tensor) -> Tensor:
        """Standardizes features of shape `[..., size]`."""
        return (features - self.mean) / self.std
