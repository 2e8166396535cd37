"""Which of an image's candidates is said best: choice by minimum Bayes risk (Kumar & Byrne 2004).

    agreement(a) = sum_b p(b) ** (1 / temperature) CIDEr-D(a, b)

The likeliest sentence is often one that few others resemble. The one that would score best if any of the others were
what a person says scores better with what people say. Without anything else all n-grams weigh alike.

Where the captioner remembers what it learned from (memory.py), what people said of the training images that are most
like this one counts as well, as Devlin et al. 2015 (arXiv 1505.04467) have it: the agreement with the candidates is
multiplied by that with the neighbors' sentences.

What suits any image is likely and agreed with, and tells little. So a candidate can also be multiplied by
(p(a | image) / p(a | average image)) ** specificity, after Li et al. 2016 (arXiv 1510.03055).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from captionlib.models.decoding.cider_d import CiderD
from captionlib.models.decoding.config import Candidate

__all__ = ["Neighbors", "order_by_consensus"]


class Neighbors(NamedTuple):
    """What was said of the training images most like an image.

    Attributes:
        sentences: as word ids.
        weights: `[sentences]`, how much each counts.
    """

    sentences: list[list[int]]
    weights: npt.NDArray[np.float64]


def order_by_consensus(
    candidates: Sequence[Candidate],
    temperature: float,
    cider: CiderD,
    neighbors: Neighbors | None = None,
    factors: npt.NDArray[np.float64] | None = None,
) -> list[Candidate]:
    """The candidates of an image, first what most agrees with the others; among equals in the order given.

    Args:
        candidates: all different.
        temperature: above 0; the lower, the more the likeliest decide alone.
        cider: compares sentences.
        neighbors: what they are to agree with as well.
        factors: `[candidates]`, what the agreement of each is multiplied by besides.
    """
    log_probs = np.array([one.log_prob for one in candidates])
    weights = np.exp((log_probs - log_probs.max()) / temperature)
    sentences = [one.words for one in candidates]
    agreement = cider.compare(sentences, sentences) @ (weights / weights.sum())
    if neighbors is not None:
        agreement *= cider.compare(sentences, neighbors.sentences) @ neighbors.weights
    if factors is not None:
        agreement *= factors
    return [candidates[place] for place in np.argsort(-agreement.round(12), kind="stable")]  # equals are to be equal
