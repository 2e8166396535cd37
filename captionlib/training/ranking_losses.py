"""Losses that bring sentences close to their images, and keep them away from the other images of a batch.

All take `scores`, `[images, sentences]`, and `image_of_sentence`, `[sentences] int64`: the row that a sentence belongs
to. What else was said of an image is no negative of its sentences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["contrastive_loss", "max_margin_loss"]


def max_margin_loss(scores: Tensor, image_of_sentence: Tensor, margin: float, hard_negatives: bool = False) -> Tensor:
    """The max-margin ranking loss, the mean over all pairs of an image and a sentence of it.

    For a pair with score p, each negative of score n costs max(0, margin - p + n): other sentences beside the image,
    and other images beside the sentence. All of them are added up (Karpathy & Fei-Fei 2015), or of each kind the one
    that costs most is taken (Faghri et al. 2018).

    Args:
        scores: `[images, sentences]`, cosines.
        image_of_sentence: `[sentences] int64`.
        margin: by how much the pair has to win.
        hard_negatives: take the hardest negative of each kind rather than all.
    """
    other = _is_other(scores, image_of_sentence)
    pairs = _scores_of_pairs(scores, image_of_sentence)
    images = F.relu(margin - pairs + scores) * other  # [images, sentences]
    beside = scores[image_of_sentence]  # [sentences, sentences]: all sentences beside the image of each
    sentences = F.relu(margin - pairs[:, None] + beside) * other[image_of_sentence]
    if hard_negatives:
        return (images.amax(0) + sentences.amax(1)).mean()
    return (images.sum(0) + sentences.sum(1)).mean()


def contrastive_loss(scores: Tensor, image_of_sentence: Tensor, log_temperature: Tensor) -> Tensor:
    """The contrastive softmax, InfoNCE of van den Oord et al. 2018 (arXiv 1807.03748), in both directions.

    For each pair -ln softmax(score / temperature) of the image among all images, and of the sentence among itself and
    the sentences of other images; the mean of both, and over all pairs.

    Args:
        scores: `[images, sentences]`, cosines.
        image_of_sentence: `[sentences] int64`.
        log_temperature: `[]`, the natural logarithm of the temperature.
    """
    logits = scores * torch.exp(-log_temperature)
    image_loss = F.cross_entropy(logits.t(), image_of_sentence)
    rivals = logits.masked_fill(~_is_other(scores, image_of_sentence), float("-inf"))[image_of_sentence]
    pairs = _scores_of_pairs(logits, image_of_sentence)
    sentence_loss = (torch.logsumexp(torch.cat([pairs[:, None], rivals], 1), 1) - pairs).mean()
    return (image_loss + sentence_loss) / 2


def _is_other(scores: Tensor, image_of_sentence: Tensor) -> Tensor:
    """`[images, sentences]`, whether a sentence was said of another image."""
    return torch.arange(len(scores), device=scores.device)[:, None] != image_of_sentence


def _scores_of_pairs(scores: Tensor, image_of_sentence: Tensor) -> Tensor:
    """`[sentences]`, the score of each sentence with its own image."""
    return scores.gather(0, image_of_sentence[None])[0]
