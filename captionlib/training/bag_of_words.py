"""Bag-of-words pre-training for small datasets: a captioner first learns which words a caption contains.

The captioner predicts all words from the image alone, without word order. This trains the layers that process the
image: attention, and the encoder layers that are fine-tuned with the captioner (`encoder_top`).
"""

from itertools import chain

import numpy as np
import torch
from torch import Tensor

from captionlib.data.batches.captions import CaptionBatch
from captionlib.data.text.vocabulary import UNKNOWN
from captionlib.models.captioners.captioner import CaptionerNetwork
from captionlib.training.caption_objective import CaptioningObjective
from captionlib.training.objective import BatchLoss, compute_perplexity

__all__ = ["BagOfWordsObjective"]


class BagOfWordsObjective(CaptioningObjective[CaptionerNetwork]):
    """Maximizes the log-probability that the captioner assigns to each word of an image's captions, given the image.

    Batches, learning rates and checkpoints are the same as in `CaptioningObjective`.
    """

    score_name = "word_perplexity"

    def loss(self, batch: CaptionBatch) -> BatchLoss:
        """Computes the mean negative log-probability of the caption words that are in the vocabulary."""
        log_probs = self._score_words(batch)
        total = -log_probs.sum()
        return BatchLoss(total / max(len(log_probs), 1), total.item(), len(log_probs))

    def validate(self) -> dict[str, float]:
        """Computes the perplexity, exp(-mean log p), of the validation caption words that are in the vocabulary."""
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
