"""The interface between the training loop and the models that it trains."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from captionlib.storage.folders import Folder
from captionlib.training.distributed import ProcessGroup

__all__ = ["Batch", "BatchLoss", "Model", "Objective", "SaveCheckpoint", "compute_perplexity"]

Batch = TypeVar("Batch")
Model = TypeVar("Model", bound=nn.Module)
SaveCheckpoint = Callable[[Folder, dict[str, Any]], object]
"""Writes a checkpoint to a folder, with a record of the run: the metrics of each epoch and all settings."""


class BatchLoss(NamedTuple):
    """The loss of a batch.

    Attributes:
        mean: `[] float32`, the value to minimize. It may include label smoothing.
        total: the logged loss, summed over tokens or image-caption pairs, without label smoothing.
        size: the number of terms of `total`, and the weight of a process's gradients in data-parallel training.
        reward_total: the sum of the rewards of sampled captions.
        reward_count: the number of sampled captions; 0 for objectives without rewards.
    """

    mean: Tensor
    total: float
    size: int
    reward_total: float = 0.0
    reward_count: int = 0


class Objective(ABC, Generic[Batch, Model]):
    """A model with its training data, its loss and its validation.

    Args:
        model: the model to train, on its device.
        save: writes a checkpoint of the model.
        module_learning_rates: learning rates of submodules of the model, by attribute name; all other parameters use
            the configured learning rate.

    Attributes:
        score_name: the validation score that selects the best epoch.
        higher_is_better: whether a higher score is better, as for CIDEr, or a lower one, as for perplexity.
        unigram_perplexity: the validation perplexity of a unigram model (word frequencies alone). Training stops if the
            perplexity stays above it. If None, this is not checked.
    """

    score_name = "perplexity"
    higher_is_better = False
    unigram_perplexity: float | None = None

    def __init__(
        self, model: Model, save: SaveCheckpoint, module_learning_rates: Mapping[str, float] | None = None
    ) -> None:
        self.model = model
        self.module_learning_rates = module_learning_rates or {}
        self.save = save
        self._group = ProcessGroup()
        self._device = next(model.parameters()).device

    @abstractmethod
    def batches(self, seed: int, epoch: int, first_batch: int) -> Iterator[Batch | None]:
        """Yields the batches of an epoch from `first_batch` on, in an order determined by `seed` and `epoch`.

        In data-parallel training, each process yields its part of every batch, or None if its part is empty.
        """

    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Returns the number of batches per epoch. The actual number may differ slightly between epochs."""

    @abstractmethod
    def loss(self, batch: Batch) -> BatchLoss: ...

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Computes the scores on the validation data."""


def compute_perplexity(log_probs: Iterable[Tensor]) -> float:
    """Computes exp(-mean ln p) over all tokens. Each item of `log_probs` is `[tokens] float32`."""
    total, tokens = 0.0, 0
    for batch in log_probs:
        total, tokens = total - batch.sum().item(), tokens + len(batch)
    return float(torch.tensor(total / max(tokens, 1)).exp())  # math.exp would raise OverflowError
