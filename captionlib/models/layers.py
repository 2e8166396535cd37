"""Layers and initial weights that captioners and rankers share."""

import torch
from torch import Tensor, nn

__all__ = ["Dropout", "Standardization", "sample_normal_weights"]


class Dropout(nn.Dropout):
    """Equivalent to `nn.Dropout`, whose `Tensor.bernoulli_` takes four times as long on a CPU as uniform numbers."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not (self.training and self.p) or not inputs.is_cpu:
            return super().forward(inputs)
        factors = torch.rand_like(inputs, dtype=torch.float32).ge_(self.p).div_(1 - self.p)  # 0 or 1 / (1 - p)
        return inputs * factors.to(inputs.dtype)


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


def sample_normal_weights(rows: int, columns: int, std: float = 1.0) -> Tensor:
    """Returns weights from N(0, std^2), `[rows, columns] float32`."""
    weights = torch.empty(rows, columns)
    # Sampling on the meta device would make PyTorch import its compiler, which takes longer than PyTorch itself.
    return weights if weights.is_meta else weights.normal_(0, std)
