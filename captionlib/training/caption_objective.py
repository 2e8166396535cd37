"""What a captioner is trained for: what people said of an image is to become likely."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from captionlib.data.batches.captions import CaptionBatch
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.models.captioners.captioner import Captioner, TokenLogProbs
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import save_captioner
from captionlib.models.checkpoints.folder import stamp_provenance
from captionlib.storage.folders import Folder
from captionlib.training.curves import draw_curves
from captionlib.training.distributed import ProcessGroup
from captionlib.training.objective import BatchLoss, perplexity

__all__ = ["Batches", "CaptionSaver", "CaptioningObjective"]

Model = TypeVar("Model", bound=nn.Module)


class Batches(Protocol):
    """Batches of one split: `CaptionBatches` of features, or `ImageBatches`."""

    def count(self, processes: int) -> int:
        """About how many batches an epoch has, when so many processes share them."""

    def shares(self, seed: int, epoch: int, process: int, processes: int, first: int) -> Iterator[CaptionBatch | None]:
        """The shares of one process, from the batch `first` on."""

    def in_order(self) -> Iterator[CaptionBatch]:
        """All images once."""


class CaptioningObjective(Generic[Model]):
    """The log-probability of sentences given their images; `perplexity` decides, or `CIDEr` where it is measured.

    Args:
        model: a `Captioner`, or what scores sentences as it does, on its device.
        training: what it learns from.
        validation: what its perplexity is taken of.
        save: writes the checkpoint, from the folder, the model and how its training went.
        label_smoothing: the share of each target that is spread over all classes.
        cider: measures its captions; None leaves that out.
        own_learning_rates: of parts of the model, see `Objective`.
    """

    def __init__(
        self,
        model: Model,
        training: Batches,
        validation: Batches,
        save: Callable[[Folder, Model, dict[str, Any]], None],
        label_smoothing: float = 0.0,
        cider: Callable[[Model], float] | None = None,
        own_learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        self.model: Model = model
        self.score_name = "perplexity" if cider is None else "CIDEr"
        self.higher_is_better = cider is not None
        self.own_learning_rates = own_learning_rates or {}
        self._training = training
        self._validation = validation
        self._processes = ProcessGroup()
        self._steps = training.count(self._processes.count)
        self._save = save
        self._smoothing = label_smoothing
        self._cider = cider
        self._device = next(model.parameters()).device

    def batches(self, seed: int, epoch: int, first: int) -> Iterator[CaptionBatch | None]:
        return self._training.shares(seed, epoch, self._processes.rank, self._processes.count, first)

    def steps(self) -> int:
        return self._steps

    def loss(self, batch: CaptionBatch) -> BatchLoss:
        """Mean negative log-probability a token, smoothed where asked for; the sum to show is not. See `Objective`."""
        log_probs, _, mean_log_probs = self.score(batch, mean_log_probs=self._smoothing > 0)
        total = -log_probs.sum()
        learnt = total
        if mean_log_probs is not None:
            learnt = (1 - self._smoothing) * total - self._smoothing * mean_log_probs.sum()
        return BatchLoss(learnt / len(log_probs), total.item(), len(log_probs))

    def validate(self) -> dict[str, float]:
        """Perplexity: exp(-sum ln p / sum (length + 1)), over the validation splits; CIDEr where it is measured."""
        scores = {"perplexity": perplexity(self.score(batch).log_probs for batch in self._validation.in_order())}
        return scores if self._cider is None else {**scores, "CIDEr": self._cider(self.model)}

    def save(self, output: Folder, training: dict[str, Any]) -> None:
        self._save(output, self.model, training)
        draw_curves(output, training["history"])

    def score(self, batch: CaptionBatch, mean_log_probs: bool = False) -> TokenLogProbs:
        """How likely the model finds the sentences of a batch, see `Captioner.forward`."""
        scores: TokenLogProbs = self.model(
            torch.from_numpy(batch.features).to(self._device),
            pad_sentences(batch.sentences).to(self._device),
            torch.from_numpy(batch.image_of_sentence).to(self._device),
            mean_log_probs,
        )
        return scores


@dataclass(frozen=True)
class CaptionSaver:
    """Writes a captioner with all that captioning needs.

    Attributes:
        vocabulary: its words.
        encoder: the description of the encoder whose features it learns from.
        provenance: where it comes from; versions and a date are added.
    """

    vocabulary: Vocabulary
    encoder: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def __call__(self, output: Folder, model: Captioner, training: dict[str, Any]) -> None:
        provenance = stamp_provenance(self.provenance)
        save_captioner(output, model, self.vocabulary, self.encoder, provenance=provenance, training=training)
