"""Trains captioners with cross-entropy or on bags of words. Validates by perplexity and CIDEr."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from captionlib.data.batches.captions import CaptionBatch, CaptionBatches
from captionlib.data.batches.images import ImageBatches
from captionlib.data.text.vocabulary import UNKNOWN, Vocabulary
from captionlib.errors import ConfigError
from captionlib.evaluation.caption_scores import CiderScorer
from captionlib.models.captioners.captioner import CaptionerNetwork, TokenLogProbs
from captionlib.models.captioners.end_to_end import ImageCaptioner
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from captionlib.training.objective import BatchLoss, Model, Objective, SaveCheckpoint, compute_perplexity

__all__ = ["BagOfWordsObjective", "CaptioningObjective", "CiderValidation"]


class CaptioningObjective(Objective[CaptionBatch, Model]):
    """Maximizes the log-probability of reference captions.

    The model is a `CaptionerNetwork` or any module with the same `forward`. If `cider` is set, CIDEr selects the best
    epoch; otherwise, perplexity does.
    """

    def __init__(
        self,
        model: Model,
        training: CaptionBatches | ImageBatches,
        validation: CaptionBatches | ImageBatches,
        save: SaveCheckpoint,
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
        log_probs, _, mean_log_probs = self.score(batch, mean_log_probs=self._smoothing > 0)
        total = -log_probs.sum()
        smoothed = total
        if mean_log_probs is not None:
            smoothed = (1 - self._smoothing) * total - self._smoothing * mean_log_probs.sum()
        return BatchLoss(smoothed / len(log_probs), total.item(), len(log_probs))

    def validate(self) -> dict[str, float]:
        log_probs = (self.score(batch).log_probs for batch in self._validation.in_order())
        scores = {"perplexity": compute_perplexity(log_probs)}
        return scores if self._cider is None else {**scores, "CIDEr": self._cider.score(self.model)}

    def score(self, batch: CaptionBatch, mean_log_probs: bool = False) -> TokenLogProbs:
        """Computes the log-probability of each token and, optionally, the mean log-probability over the vocabulary."""
        scores: TokenLogProbs = self.model(
            torch.from_numpy(batch.features).to(self._device),
            pad_sentences(batch.sentences).to(self._device),
            torch.from_numpy(batch.image_of_caption).to(self._device),
            mean_log_probs,
        )
        return scores


class BagOfWordsObjective(CaptioningObjective[CaptionerNetwork]):
    """Maximizes the log-probability of each word of an image's captions that is in the vocabulary, given the image.

    On small datasets, this is a first stage that trains the layers that process the image: attention, and the encoder
    layers that are fine-tuned with the captioner (`encoder_top`).
    """

    score_name = "word_perplexity"

    def loss(self, batch: CaptionBatch) -> BatchLoss:
        log_probs = self._score_words(batch)
        total = -log_probs.sum()
        return BatchLoss(total / max(len(log_probs), 1), total.item(), len(log_probs))

    def validate(self) -> dict[str, float]:
        return {"word_perplexity": compute_perplexity(map(self._score_words, self._validation.in_order()))}

    def _score_words(self, batch: CaptionBatch) -> Tensor:
        """Returns the log-probability of each caption word that is in the vocabulary, `[words] float32`."""
        words = np.fromiter(chain.from_iterable(batch.sentences), np.int64)
        image_of_word = np.repeat(batch.image_of_caption, [len(sentence) for sentence in batch.sentences])
        is_known = words != UNKNOWN
        log_probs = self.model.predict_bag_of_words(torch.from_numpy(batch.features).to(self._device))
        rows, columns = (torch.from_numpy(ids[is_known]).to(self._device) for ids in (image_of_word, words))
        selected: Tensor = log_probs[rows, columns]
        return selected


class CiderValidation:
    """Measures the CIDEr of the captions that a captioner generates for the validation images.

    `references` holds the reference captions of each image of `batches`. An unreadable image has an empty caption.

    Raises:
        ConfigError: Java, which CIDEr's tokenizer requires, is missing, or `decoding` requires a ranker or a datastore.
        DatasetError: there are fewer than two images.
    """

    def __init__(
        self,
        batches: CaptionBatches | ImageBatches,
        references: Sequence[Sequence[str]],
        vocabulary: Vocabulary,
        decoding: DecodingConfig,
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
            features: npt.NDArray[Any] | Tensor = inputs
            if isinstance(model, ImageCaptioner):
                pixels = torch.from_numpy(inputs).to(next(model.parameters()).device)
                features = model.encoder.encode(pixels).float()
            for image_index, candidates in zip(image_indices, decoder.decode(features), strict=True):
                captions[image_index] = self._vocabulary.decode(candidates[0].token_ids)
        return self._scorer.score(captions)
