"""Losses that move captions close to their images and away from the other images of the batch.

All of them take `scores`, `[images, captions]`, and `image_of_sentence`, `[captions] int64`, the row of the image that
a caption describes. Other captions of the same image are not negatives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["contrastive_loss", "max_margin_loss"]


def max_margin_loss(scores: Tensor, image_of_sentence: Tensor, margin: float, hard_negatives: bool = False) -> Tensor:
    """Computes the max-margin ranking loss, averaged over all pairs of an image and one of its captions.

    For a pair with score p, a negative with score n costs max(0, margin - p + n). The negatives are the captions of
    other images for the image, and the other images for the caption. Their costs are summed (Karpathy & Fei-Fei 2015),
    or only the highest of each kind counts (Faghri et al. 2018, VSE++).

    Args:
        scores: `[images, captions]`, cosine similarities.
        image_of_sentence: `[captions] int64`.
        margin: the margin by which a pair has to exceed its negatives.
        hard_negatives: count only the hardest negative of each kind.
    """
    is_negative = _negatives(scores, image_of_sentence)
    pairs = _pair_scores(scores, image_of_sentence)
    image_costs = F.relu(margin - pairs + scores) * is_negative  # [images, captions]
    caption_scores = scores[image_of_sentence]  # [captions, captions], all captions for the image of each caption
    caption_costs = F.relu(margin - pairs[:, None] + caption_scores) * is_negative[image_of_sentence]
    if hard_negatives:
        return (image_costs.amax(0) + caption_costs.amax(1)).mean()
    return (image_costs.sum(0) + caption_costs.sum(1)).mean()


def contrastive_loss(scores: Tensor, image_of_sentence: Tensor, log_temperature: Tensor) -> Tensor:
    """Computes the contrastive loss (InfoNCE, van den Oord et al. 2018, arXiv 1807.03748) in both directions.

    For each pair, -ln softmax(score / temperature) of the image among all images, and of the caption among itself and
    the captions of other images. The result is the mean of both directions, averaged over all pairs.

    Args:
        scores: `[images, captions]`, cosine similarities.
        image_of_sentence: `[captions] int64`.
        log_temperature: `[]`, the natural logarithm of the temperature.
    """
    logits = scores * torch.exp(-log_temperature)
    image_loss = F.cross_entropy(logits.t(), image_of_sentence)
    is_negative = _negatives(scores, image_of_sentence)
    negatives = logits.masked_fill(~is_negative, float("-inf"))[image_of_sentence]  # [captions, captions]
    pairs = _pair_scores(logits, image_of_sentence)
    caption_loss = (torch.logsumexp(torch.cat([pairs[:, None], negatives], 1), 1) - pairs).mean()
    return (image_loss + caption_loss) / 2


def _negatives(scores: Tensor, image_of_sentence: Tensor) -> Tensor:
    """Returns whether a caption describes another image, `[images, captions] bool`."""
    return torch.arange(len(scores), device=scores.device)[:, None] != image_of_sentence


def _pair_scores(scores: Tensor, image_of_sentence: Tensor) -> Tensor:
    """Returns the score of each caption with its image, `[captions]`."""
    return scores.gather(0, image_of_sentence[None])[0]
