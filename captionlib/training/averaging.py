"""Exponential moving averages of a model's weights, which often generalize better than the weights of the last step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["apply_average", "average_weights"]


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """Returns an exponential moving average of a model's weights, to be updated after each optimizer step.

    It starts from the weights after the first step. Before the n-th update after that, the decay is limited to
    (1 + n) / (10 + n), as in TensorFlow's `ExponentialMovingAverage`, so that early weights fade quickly.

    Args:
        model: the model.
        decay: the weight of the previous average in each update, in [0, 1).
    """

    @torch.no_grad()
    def update(averages: Iterable[Tensor], weights: Iterable[Tensor], updates: Tensor | int) -> None:
        limited = min(decay, (1 + int(updates)) / (10 + int(updates)))
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1 - limited)

    return AveragedModel(model, multi_avg_fn=update)


@contextmanager
def apply_average(model: nn.Module, average: AveragedModel) -> Iterator[None]:
    """Gives the model the averaged weights within the block, and restores its own exactly when the block ends."""
    own = [parameter.detach().clone() for parameter in model.parameters()]
    _copy_weights(average.module.parameters(), model)
    try:
        yield
    finally:
        _copy_weights(own, model)


@torch.no_grad()
def _copy_weights(weights: Iterable[Tensor], model: nn.Module) -> None:
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.copy_(weight)
