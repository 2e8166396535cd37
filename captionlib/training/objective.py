"""The interface between the training loop and the models that it trains."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from captionlib.storage.folders import Folder

__all__ = ["Batch", "BatchLoss", "Objective", "compute_perplexity"]

Batch = TypeVar("Batch")


class BatchLoss(NamedTuple):
    """The loss of a batch.

    Attributes:
        mean: `[] float32`, the value to minimize.
        total: the reported loss, summed.
        size: the number of summands of `total`. It also weights the gradients of a process in a group.
        reward_total: the rewards of sampled captions, summed.
        reward_count: the number of sampled captions; 0 for objectives without rewards.
    """

    mean: Tensor
    total: float
    size: int
    reward_total: float = 0.0
    reward_count: int = 0


class Objective(Protocol[Batch]):
    """A model with its training data, its loss and its validation."""

    @property
    def model(self) -> nn.Module:
        """The model to train."""

    @property
    def part_learning_rates(self) -> Mapping[str, float]:
        """Learning rates of individual attributes of the model, by name; the others use the configured one."""

    @property
    def score_name(self) -> str:
        """The validation score that selects the best epoch, such as `perplexity`."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher score is better, as for CIDEr, or a lower one, as for perplexity."""

    def batches(self, seed: int, epoch: int, first: int) -> Iterator[Batch | None]:
        """Yields the batches of an epoch from batch `first` on, in an order that `seed` and `epoch` determine.

        In a group of processes, each yields its part of the same batches, or None if it has no part in one.
        """

    def steps_per_epoch(self) -> int:
        """Returns the approximate number of batches per epoch."""

    def loss(self, batch: Batch) -> BatchLoss:
        """Computes the loss of a batch."""

    def validate(self) -> dict[str, float]:
        """Computes the scores on the validation data."""

    def save(self, output: Folder, training: dict[str, Any]) -> None:
        """Writes the checkpoint."""


def compute_perplexity(log_probs: Iterable[Tensor]) -> float:
    """Computes exp(-mean ln p) over the tokens of all batches, `[tokens] float32` each."""
    total, tokens = 0.0, 0
    for batch in log_probs:
        total, tokens = total - batch.sum().item(), tokens + len(batch)
    return float(torch.tensor(total / max(tokens, 1)).exp())
