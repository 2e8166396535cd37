"""Samples weights from a normal distribution."""

import torch
from torch import Tensor

__all__ = ["sample_normal_weights"]


def sample_normal_weights(rows: int, columns: int, std: float = 1.0) -> Tensor:
    """Returns weights from N(0, std^2), `[rows, columns] float32`.

    On the meta device, which is for shapes only, nothing is sampled: PyTorch would import its compiler for that, which
    takes longer than to import PyTorch.
    """
    weights = torch.empty(rows, columns)
    return weights if weights.is_meta else weights.normal_(0, std)
