"""Dropout that is fast on a CPU."""

import torch
from torch import Tensor, nn

__all__ = ["Dropout"]


class Dropout(nn.Dropout):
    """Equivalent to `nn.Dropout`, whose `Tensor.bernoulli_` takes four times as long on a CPU as uniform numbers."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not (self.training and self.p) or not inputs.is_cpu:
            return super().forward(inputs)
        factors = torch.rand_like(inputs, dtype=torch.float32).ge_(self.p).div_(1 - self.p)  # 0 or 1 / (1 - p)
        return inputs * factors.to(inputs.dtype)
