"""Trains captioners with cross-entropy, and validates them by perplexity and by the CIDEr of generated captions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy.typing as npt
import torch
from torch import nn

from captionlib.data.batches.captions import CaptionBatch, CaptionBatches
from captionlib.data.batches.images import ImageBatches
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import ConfigError
from captionlib.evaluation.caption_scores import CiderScorer
from captionlib.models.captioners.captioner import CaptionerNetwork, TokenLogProbs
from captionlib.models.captioners.end_to_end import ImageCaptioner
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from captionlib.training.objective import BatchLoss, Model, Objective, SaveModel, compute_perplexity

__all__ = ["Batches", "CaptioningObjective", "CiderValidation"]

Batches: TypeAlias = CaptionBatches | ImageBatches


class CaptioningObjective(Objective[CaptionBatch, Model]):
    """Maximizes the log-probability of reference captions. Validates by perplexity, and by CIDEr if configured.

    The model is a `CaptionerNetwork` or any module with the same `forward`. If `cider` is set, CIDEr selects the best
    epoch. See `Objective` and `CaptionerTrainingConfig` for the other arguments.
    """

    def __init__(
        self,
        model: Model,
        training: Batches,
        validation: Batches,
        save: SaveModel[Model],
        label_smoothing: float = 0.0,
        cider: "CiderValidation | None" = None,
        module_learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(model, save, module_learning_rates)
        if cider is not None:
            self.score_name, self.higher_is_better = "CIDEr", True
        self._training = training
        self._validation = validation
        self._smoothing = label_smoothing
        self._cider = cider

    def batches(self, seed: int, epoch: int, first_batch: int) -> Iterator[CaptionBatch | None]:
        return self._training.shuffled(seed, epoch, self._group.rank, self._group.world_size, first_batch)

    def steps_per_epoch(self) -> int:
        return self._training.count(self._group.world_size)

    def loss(self, batch: CaptionBatch) -> BatchLoss:
        """Computes the mean negative log-probability per token. The reported total ignores label smoothing."""
        log_probs, _, mean_log_probs = self.score(batch, mean_log_probs=self._smoothing > 0)
        total = -log_probs.sum()
        smoothed = total
        if mean_log_probs is not None:
            smoothed = (1 - self._smoothing) * total - self._smoothing * mean_log_probs.sum()
        return BatchLoss(smoothed / len(log_probs), total.item(), len(log_probs))

    def validate(self) -> dict[str, float]:
        """Computes the perplexity, exp(-sum ln p / number of tokens including END), and CIDEr if configured."""
        log_probs = (self.score(batch).log_probs for batch in self._validation.in_order())
        scores = {"perplexity": compute_perplexity(log_probs)}
        return scores if self._cider is None else {**scores, "CIDEr": self._cider.score(self.model)}

    def score(self, batch: CaptionBatch, mean_log_probs: bool = False) -> TokenLogProbs:
        """Computes the log-probability of each token of a batch of captions.

        With `mean_log_probs`, also computes the mean log-probability over the vocabulary. See `CaptionerNetwork`.
        """
        scores: TokenLogProbs = self.model(
            torch.from_numpy(batch.features).to(self._device),
            pad_sentences(batch.sentences).to(self._device),
            torch.from_numpy(batch.image_of_caption).to(self._device),
            mean_log_probs,
        )
        return scores


class CiderValidation:
    """Measures the CIDEr of the captions that a captioner generates for the validation images.

    The caption of an unreadable image is empty. `references` holds the reference captions of each image, in the order
    of `batches`.

    Raises:
        ConfigError: Java, which CIDEr's tokenizer requires, is missing, or `decoding` requires a ranker or a datastore.
        DatasetError: there are fewer than two images.
    """

    def __init__(
        self, batches: Batches, references: Sequence[Sequence[str]], vocabulary: Vocabulary, decoding: DecodingConfig
    ) -> None:
        if decoding.rerank.method == "image_text":
            raise ConfigError("decoding.rerank.method: expected none or mbr during training, got image_text; change it")
        if decoding.rerank.neighbors:
            raise ConfigError(
                f"decoding.rerank.neighbors: expected 0 during training, got {decoding.rerank.neighbors}; "
                "the required datastore of training captions is built after training (captionlib build-datastore)"
            )
        self._batches = batches
        self._image_count = len(references)
        self._vocabulary = vocabulary
        self._decoding = decoding
        self._scorer = CiderScorer(references)

    def score(self, model: nn.Module) -> float:
        """Returns the CIDEr of a `CaptionerNetwork`, or of an `ImageCaptioner` (a captioner with its encoder)."""
        captioner = model.captioner if isinstance(model, ImageCaptioner) else model
        assert isinstance(captioner, CaptionerNetwork)
        decoder = Decoder(captioner, self._decoding, vocabulary=self._vocabulary)
        captions = [""] * self._image_count
        for image_indices, inputs in self._batches.images_in_order():
            features: npt.NDArray[Any] | torch.Tensor = inputs
            if isinstance(model, ImageCaptioner):
                pixels = torch.from_numpy(inputs).to(next(model.parameters()).device)
                features = model.encoder.encode(pixels).float()
            for image_index, candidates in zip(image_indices, decoder.decode(features), strict=True):
                captions[image_index] = self._vocabulary.decode(candidates[0].token_ids)
        return self._scorer.score(captions)
