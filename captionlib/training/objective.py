"""What the loop trains: anything that has batches, a loss and a validation score."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from captionlib.storage.folders import Folder

__all__ = ["Batch", "BatchLoss", "Objective", "is_higher_better", "own_learning_rates", "perplexity"]

Batch = TypeVar("Batch")


class BatchLoss(NamedTuple):
    """How far a model is from what a batch asks for.

    Attributes:
        mean: `[] float32`, what to minimise.
        total: the summed loss, to show.
        size: what it is summed over; of several processes' gradients each counts as much.
        reward: summed over the sentences that were drawn, to show.
        drawn: how many they are; an objective without rewards draws none.
    """

    mean: Tensor
    total: float
    size: int
    reward: float = 0.0
    drawn: int = 0


class Objective(Protocol[Batch]):
    """A model, what it learns from, and how well it does.

    Lower scores are better, unless it has `higher_is_better` and says so. Parts of the model may have learning rates of
    their own, where it has `own_learning_rates`: from the names of the model's attributes.
    """

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    @property
    def score_name(self) -> str:
        """Which of the validation scores decides, such as `perplexity`."""

    def batches(self, seed: int, epoch: int, first: int) -> Iterator[Batch | None]:
        """The batches of an epoch from the batch `first` on; the same for the same seed and epoch.

        Of several processes each gives its shares of the same batches, None where nothing of a batch falls to it.
        """

    def steps(self) -> int:
        """About how many batches an epoch has."""

    def loss(self, batch: Batch) -> BatchLoss:
        """What to minimise, and what to show of it."""

    def validate(self) -> dict[str, float]:
        """The scores on held-out images."""

    def save(self, output: Folder, training: dict[str, Any]) -> None:
        """Writes the checkpoint that is used later."""


def is_higher_better(objective: Objective[Any]) -> bool:
    """Whether the score that decides is to grow, as CIDEr is, or to fall, as perplexity is."""
    return bool(getattr(objective, "higher_is_better", False))


def own_learning_rates(objective: Objective[Any]) -> Mapping[str, float]:
    """The learning rates of parts of the model, before the schedule, by the names of its attributes."""
    rates: Mapping[str, float] = getattr(objective, "own_learning_rates", {})
    return rates


def perplexity(log_probs: Iterable[Tensor]) -> float:
    """exp(-mean ln p) over the tokens of all batches, `[tokens] float32` each."""
    total, tokens = 0.0, 0
    for of_batch in log_probs:
        total, tokens = total - of_batch.sum().item(), tokens + len(of_batch)
    return float(torch.tensor(total / max(tokens, 1)).exp())
