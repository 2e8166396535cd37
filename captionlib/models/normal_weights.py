"""Samples weights from a normal distribution."""

import torch
from torch import Tensor

__all__ = ["sample_normal_weights"]


def sample_normal_weights(rows: int, columns: int, std: float = 1.0) -> Tensor:
    """Returns weights from N(0, std^2), `[rows, columns] float32`."""
    weights = torch.empty(rows, columns)
    # Sampling on the meta device would make PyTorch import its compiler, which takes longer than PyTorch itself.
    return weights if weights.is_meta else weights.normal_(0, std)
