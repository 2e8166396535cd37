"""A running average of the weights, which often says better what training found than where its last step ended."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["WeightAverage"]


class WeightAverage:
    """The exponential moving average of a model's weights.

    The first steps forget faster, so that the drawn weights do not linger: the share that stays is at most
    (1 + step) / (10 + step).

    Args:
        parameters: the weights; they are averaged as they are after each step.
        decay: the share of the average that stays at a step.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self._parameters = parameters
        self._averages = [parameter.detach().clone() for parameter in parameters]
        self._decay = decay
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights in, after a step."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model the averaged weights for a while; its own come back bit for bit."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        self._copy(self._averages)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self._averages, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)
        self._steps = state["steps"]
