"""Standardization of features to mean 0 and standard deviation 1."""

import torch
from torch import Tensor, nn

__all__ = ["Standardization"]


class Standardization(nn.Module):
    """Computes (x - mean) / std for features `[..., size]`. The mean and std are 0 and 1 until `set_statistics`."""

    mean: Tensor
    std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets the mean and standard deviation, `[size]` each. A dimension with standard deviation 0 is not scaled."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std
