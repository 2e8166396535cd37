"""Losses that raise the similarity of captions to their own images and lower their similarity to other images.

`scores` is `[images, captions]`, the cosine similarities, and `image_of_caption` is `[captions] int64`, the row in
`scores` of the image that each caption describes. Other captions of the same image are not negatives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["contrastive_loss", "max_margin_loss"]


def max_margin_loss(scores: Tensor, image_of_caption: Tensor, margin: float, hard_negatives: bool = False) -> Tensor:
    """Computes the max-margin ranking loss, averaged over all pairs of an image and one of its captions.

    For a pair with score p, a negative with score n costs max(0, margin - p + n). The image's negatives are the
    captions of other images, and the caption's negatives are the other images. The loss of a pair is the sum of the
    costs of all its negatives (Karpathy & Fei-Fei 2015). With `hard_negatives`, it is the sum of only two costs: the
    highest among the image's negatives and the highest among the caption's negatives (Faghri et al. 2018, VSE++).
    """
    is_negative = _find_negatives(scores, image_of_caption)
    pairs = _select_pair_scores(scores, image_of_caption)
    negative_image_costs = F.relu(margin - pairs + scores) * is_negative  # [images, captions]
    caption_scores = scores[image_of_caption]  # [captions, captions], row c for the image of caption c
    negative_caption_costs = F.relu(margin - pairs[:, None] + caption_scores) * is_negative[image_of_caption]
    if hard_negatives:
        return (negative_image_costs.amax(0) + negative_caption_costs.amax(1)).mean()
    return (negative_image_costs.sum(0) + negative_caption_costs.sum(1)).mean()


def contrastive_loss(scores: Tensor, image_of_caption: Tensor, log_temperature: Tensor) -> Tensor:
    """Computes the contrastive loss (InfoNCE, van den Oord et al. 2018, arXiv 1807.03748) in both directions.

    A pair costs -ln softmax(score / temperature). From caption to image, the softmax is over all images. From image to
    caption, it is over the caption of the pair and all captions of other images. The loss is the mean over both
    directions and all pairs. `log_temperature` is a scalar tensor, the natural logarithm of the temperature.
    """
    logits = scores * torch.exp(-log_temperature)
    image_loss = F.cross_entropy(logits.t(), image_of_caption)
    is_negative = _find_negatives(scores, image_of_caption)
    negatives = logits.masked_fill(~is_negative, float("-inf"))[image_of_caption]  # [captions, captions]
    pairs = _select_pair_scores(logits, image_of_caption)
    caption_loss = (torch.logsumexp(torch.cat([pairs[:, None], negatives], 1), 1) - pairs).mean()
    return (image_loss + caption_loss) / 2


def _find_negatives(scores: Tensor, image_of_caption: Tensor) -> Tensor:
    """Returns `[images, captions] bool`: whether the caption describes a different image."""
    return torch.arange(len(scores), device=scores.device)[:, None] != image_of_caption


def _select_pair_scores(scores: Tensor, image_of_caption: Tensor) -> Tensor:
    """Returns the score of each caption with its own image, `[captions]`."""
    return scores.gather(0, image_of_caption[None])[0]
