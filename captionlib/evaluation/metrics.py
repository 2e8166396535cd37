"""Computes the standard caption metrics from statistics that are summed over images.

BLEU and METEOR of a set of captions are not means over images but are computed from summed counts. Each metric here
therefore has one row of statistics per image, and a formula that maps a sum of rows to a score. The sum of all rows
gives the score of the set, and a single row gives the score of one image. The sum over a bootstrap resample gives the
score of that resample. The formula is vectorized and scores thousands of resamples at once.

The statistics come from pycocoevalcap, and the scores equal those that it computes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from captionlib.evaluation.java import count_alignments

__all__ = ["Metric", "compute_bleu", "compute_cider", "compute_meteor", "compute_ratio", "compute_rouge_l"]

Numbers = npt.NDArray[np.float64]
Tokenized = Mapping[str, Sequence[str]]
"""Tokenized captions or references by image id, with spaces between tokens."""

_ORDERS = 4  # BLEU-1 to BLEU-4

# pycocoevalcap's smoothing constants, which prevent a division by zero in BLEU if there are no matches or words.
_SMALL, _TINY = 1e-9, 1e-15

# The parameters of METEOR 1.5 for English (Denkowski & Lavie 2014, table 2): the weight of recall in the mean, the
# exponent and weight of the fragmentation penalty, the weight of content words, and the weights of exact, stem, synonym
# and paraphrase matches.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])


@dataclass(frozen=True)
class Metric:
    """Scores that are computed from statistics summed over images."""

    names: tuple[str, ...]
    rows: Numbers  # statistics of each image, [images, statistics]
    formula: Callable[[Numbers], Numbers]  # sums of rows, [..., statistics], to scores, [..., names], NaN if undefined


def compute_bleu(captions: Tokenized, references: Tokenized) -> Metric:
    """Computes BLEU-1 to BLEU-4 (Papineni et al. 2002) with the closest reference length.

    Like all metrics, it requires one caption per image, and the same images in the same order in both mappings.
    """
    scorer = BleuScorer(n=_ORDERS)
    for image_id, (caption,) in captions.items():
        scorer += (caption, list(references[image_id]))
    rows = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        closest = min((abs(other - length), other) for other in counts["reflen"])[1]
        rows.append([*counts["correct"], *counts["guess"], length, closest])
    return Metric(tuple(f"BLEU-{n}" for n in range(1, _ORDERS + 1)), np.array(rows, np.float64), _bleu)


def _bleu(sums: Numbers) -> Numbers:
    """Returns the geometric mean of the n-gram precisions up to each order, times the brevity penalty."""
    correct, guessed = sums[..., :_ORDERS], sums[..., _ORDERS : 2 * _ORDERS]
    length, reference_length = sums[..., -2:-1], sums[..., -1:]
    products = np.cumprod((correct + _TINY) / (guessed + _SMALL), axis=-1)
    ratio = (length + _TINY) / (reference_length + _SMALL)
    with np.errstate(over="ignore", divide="ignore"):
        penalty = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    scores: Numbers = products ** (1 / np.arange(1, _ORDERS + 1)) * penalty
    return scores


def compute_meteor(captions: Tokenized, references: Tokenized) -> Metric:
    """Computes METEOR 1.5 (Denkowski & Lavie 2014) from the counts of METEOR's Java program; see `count_alignments`."""
    rows = count_alignments([(caption, references[image_id]) for image_id, (caption,) in captions.items()])
    return Metric(("METEOR",), rows, _meteor)


def _meteor(sums: Numbers) -> Numbers:
    """Returns the weighted mean of precision and recall, times 1 - fragmentation penalty; see `count_alignments`."""
    # [..., kind of match, 4]: content words of caption and reference, then function words of caption and reference
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    weights = np.array([_DELTA, _DELTA, 1 - _DELTA, 1 - _DELTA])
    weighted = (matches * weights * _MATCH_WEIGHTS[:, None]).sum(-2)
    lengths, function_words = sums[..., 0:2], sums[..., 2:4]
    matched = weighted[..., 0:2] + weighted[..., 2:4]
    total = _DELTA * (lengths - function_words) + (1 - _DELTA) * function_words
    precision, recall = np.moveaxis(_divide(matched, total), -1, 0)
    mean = _divide(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    chunks, matched_words = sums[..., 20], sums[..., 21:23]
    fragmentation = _divide(chunks, matched_words.mean(-1))
    scores: Numbers = (mean * (1 - _GAMMA * fragmentation**_BETA))[..., None]
    return scores


def compute_rouge_l(captions: Tokenized, references: Tokenized) -> Metric:
    """Computes ROUGE-L (Lin 2004) as the mean over images."""
    rouge = Rouge()
    scores = [rouge.calc_score([caption], list(references[image_id])) for image_id, (caption,) in captions.items()]
    return compute_ratio("ROUGE-L", scores, np.ones(len(scores)))


def compute_cider(captions: Tokenized, references: Tokenized) -> Metric:
    """Computes CIDEr (Vedantam et al. 2015) as the mean over images.

    The document frequencies come from the references of all images and are the same in every bootstrap resample.
    """
    with redirect_stdout(io.StringIO()):
        _, scores = Cider().compute_score(
            {image_id: list(texts) for image_id, texts in references.items()},
            {image_id: list(texts) for image_id, texts in captions.items()},
        )
    return compute_ratio("CIDEr", scores, np.ones(len(scores)))


def compute_ratio(
    name: str,
    numerators: Sequence[float] | Numbers,
    denominators: Sequence[float] | Numbers,
    transform: Callable[[Numbers], Numbers] = lambda quotient: quotient,
) -> Metric:
    """Computes a score from the quotient of two sums over images. The score is NaN if the denominators sum to 0."""
    rows = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], 1)
    return Metric((name,), rows, lambda sums: transform(_divide(sums[..., 0], sums[..., 1], np.nan))[..., None])


def _divide(numerator: Numbers, denominator: Numbers, default: float = 0.0) -> Numbers:
    return np.divide(numerator, denominator, out=np.full_like(numerator, default), where=denominator != 0)
