"""The first stage for few images: a captioner learns which words its sentences will have, before it learns their order.

It is asked at START, when it has seen the image alone; so an image teaches what there is to be seen in it, and not once
more how sentences go. What profits is whatever looks: the encoder's encoder_top first of all.
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
from captionlib.training.objective import BatchLoss, perplexity

__all__ = ["BagOfWordsObjective"]


class BagOfWordsObjective:
    """The log-probability of the words of an image's sentences, each as the first word; `word_perplexity` decides.

    Data, learning rates and checkpoints are those of captioning.

    Args:
        captioning: the captioner and its data.
        validation: what its perplexity is taken of.
    """

    score_name = "word_perplexity"

    def __init__(self, captioning: CaptioningObjective[Captioner], validation: Batches) -> None:
        self.model: Captioner = captioning.model
        self.own_learning_rates = captioning.own_learning_rates
        self._captioning = captioning
        self._validation = validation

    def batches(self, seed: int, epoch: int, first: int) -> Iterator[CaptionBatch | None]:
        return self._captioning.batches(seed, epoch, first)

    def steps(self) -> int:
        return self._captioning.steps()

    def loss(self, batch: CaptionBatch) -> BatchLoss:
        """The mean over the words that the captioner knows; see `Objective.loss`."""
        log_probs = self._score(batch)
        total = -log_probs.sum()
        return BatchLoss(total / max(len(log_probs), 1), total.item(), len(log_probs))

    def validate(self) -> dict[str, float]:
        """exp(-mean ln p) over the words of the validation splits, in whatever order they stand."""
        return {"word_perplexity": perplexity(map(self._score, self._validation.in_order()))}

    def save(self, output: Folder, training: dict[str, Any]) -> None:
        self._captioning.save(output, training)

    def _score(self, batch: CaptionBatch) -> Tensor:
        """The log-probability of each known word of a batch's sentences, `[words] float32`."""
        words = np.fromiter(chain.from_iterable(batch.sentences), np.int64)
        images = np.repeat(batch.image_of_sentence, [len(sentence) for sentence in batch.sentences])
        known = words != UNKNOWN
        device = self.model.output.weight.device
        log_probs = self.model.predict_bag_of_words(torch.from_numpy(batch.features).to(device))
        of_words: Tensor = log_probs[
            torch.from_numpy(images[known]).to(device), torch.from_numpy(words[known]).to(device)
        ]
        return of_words
