"""Bag-of-words pre-training for small datasets: a captioner first learns to predict which words a caption has.

The prediction is made at START, where the captioner has seen only the image. Each image thus teaches what it shows
rather than sentence structure, which benefits the layers that see it: the attention and the encoder's top layers.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captionlib.data.batches.captions import CaptionBatch
from captionlib.data.text.vocabulary import UNKNOWN
from captionlib.models.captioners.captioner import Captioner
from captionlib.storage.folders import Folder
from captionlib.training.caption_objective import Batches, CaptioningObjective
from captionlib.training.objective import BatchLoss, compute_perplexity

__all__ = ["BagOfWordsObjective"]


class BagOfWordsObjective:
    """Maximizes the log-probability of each word of an image's captions as the first word of a caption.

    Batches, learning rates and checkpoints are those of captioning.

    Args:
        captioning: the captioner and its data.
        validation: the validation batches.
    """

    score_name = "word_perplexity"
    higher_is_better = False

    def __init__(self, captioning: CaptioningObjective[Captioner], validation: Batches) -> None:
        self.model: Captioner = captioning.model
        self.part_learning_rates = captioning.part_learning_rates
        self._captioning = captioning
        self._validation = validation

    def batches(self, seed: int, epoch: int, first: int) -> Iterator[CaptionBatch | None]:
        return self._captioning.batches(seed, epoch, first)

    def steps_per_epoch(self) -> int:
        return self._captioning.steps_per_epoch()

    def loss(self, batch: CaptionBatch) -> BatchLoss:
        """Computes the mean negative log-probability over the words of the vocabulary."""
        log_probs = self._score(batch)
        total = -log_probs.sum()
        return BatchLoss(total / max(len(log_probs), 1), total.item(), len(log_probs))

    def validate(self) -> dict[str, float]:
        """Computes exp(-mean ln p) over the words of the validation captions."""
        return {"word_perplexity": compute_perplexity(map(self._score, self._validation.in_order()))}

    def save(self, output: Folder, training: dict[str, Any]) -> None:
        self._captioning.save(output, training)

    def _score(self, batch: CaptionBatch) -> Tensor:
        """Returns the log-probability of each known word of the captions, `[words] float32`."""
        words = np.fromiter(chain.from_iterable(batch.sentences), np.int64)
        images = np.repeat(batch.image_of_sentence, [len(sentence) for sentence in batch.sentences])
        is_known = words != UNKNOWN
        device = self.model.output.weight.device
        log_probs = self.model.predict_bag_of_words(torch.from_numpy(batch.features).to(device))
        images_of_known, known = (torch.from_numpy(part[is_known]).to(device) for part in (images, words))
        selected: Tensor = log_probs[images_of_known, known]
        return selected
