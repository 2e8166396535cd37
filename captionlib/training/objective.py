"""What the loop trains: anything that has batches, a loss and a validation score."""

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from captionlib.storage import Folder

__all__ = ["Batch", "Objective"]

Batch = TypeVar("Batch")


class Objective(Protocol[Batch]):
    """A model, what it learns from, and how well it does."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    @property
    def score_name(self) -> str:
        """Which of the validation scores decides, such as `perplexity`; lower is better."""

    def batches(self, seed: int, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch; the same for the same seed and epoch."""

    def steps(self) -> int:
        """About how many batches an epoch has."""

    def loss(self, batch: Batch) -> tuple[Tensor, float, int]:
        """What to minimise; the summed loss and the count it is summed over, to show."""

    def validate(self) -> dict[str, float]:
        """The scores on held-out images."""

    def save(self, output: Folder, training: dict[str, Any]) -> None:
        """Writes the checkpoint that is used later."""
