"""The field's caption scores as statistics an image and a formula over their sums.

BLEU and METEOR of a set of captions are no means of the images' own: they are computed from counts that add up. So each
metric here is a row of numbers an image, and a formula from sums of rows to scores. The formula of the sum over all
images is the score of the set, of a single row that of an image, and of the sum over a resample what the bootstrap
needs, exactly and at once for thousands of resamples.

The counts come from pycocoevalcap; its own scores come out to the last digits.
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

from captionlib.evaluation.meteor import count_alignments

__all__ = ["Metric", "bleu", "cider", "meteor", "ratio", "rouge_l"]

Numbers = npt.NDArray[np.float64]
Tokenized = Mapping[str, Sequence[str]]
"""By image id, sentences whose tokens have a space between them."""

_ORDERS = 4  # BLEU-1 to BLEU-4

# pycocoevalcap's: they keep a BLEU without a match, or without a word, from dividing by nothing.
_SMALL, _TINY = 1e-9, 1e-15

# METEOR 1.5's for English (Denkowski & Lavie 2014, table 2): the weight of recall in the mean, the exponent and the
# weight of the fragmentation penalty, the weight of content words, and of each kind of match: exact, stem, synonym,
# paraphrase.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])


@dataclass(frozen=True)
class Metric:
    """Scores that are computed from sums over images.

    Attributes:
        names: of the scores.
        rows: `[images, statistics]`.
        formula: from `[..., statistics]`, sums of rows, to `[..., len(names)]`; not a number where there is no score.
    """

    names: tuple[str, ...]
    rows: Numbers
    formula: Callable[[Numbers], Numbers]


def bleu(captions: Tokenized, references: Tokenized) -> Metric:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002), against the reference whose length is closest.

    Args:
        captions: one an image.
        references: of the same images in the same order.
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
    """The geometric mean of the precisions up to each order, times the penalty of captions that are too short."""
    correct, guessed = sums[..., :_ORDERS], sums[..., _ORDERS : 2 * _ORDERS]
    length, expected = sums[..., -2:-1], sums[..., -1:]
    products = np.cumprod((correct + _TINY) / (guessed + _SMALL), axis=-1)
    ratio = (length + _TINY) / (expected + _SMALL)
    with np.errstate(over="ignore", divide="ignore"):
        penalty = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    scores: Numbers = products ** (1 / np.arange(1, _ORDERS + 1)) * penalty
    return scores


def meteor(captions: Tokenized, references: Tokenized) -> Metric:
    """METEOR 1.5 (Denkowski & Lavie 2014), by its Java program; arguments as of `bleu`.

    Raises:
        ConfigError: there is no Java, or it fails.
    """
    rows = count_alignments([(caption, references[image_id]) for image_id, (caption,) in captions.items()])
    return Metric(("METEOR",), rows, _meteor)


def _meteor(sums: Numbers) -> Numbers:
    """The mean of precision and recall, with the penalty of matches that are scattered; see `count_alignments`."""
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)  # by kind, then content of both, function of both
    weights = np.array([_DELTA, _DELTA, 1 - _DELTA, 1 - _DELTA])
    weighted = (matches * weights * _MATCH_WEIGHTS[:, None]).sum(-2)
    lengths, function_words = sums[..., 0:2], sums[..., 2:4]
    of_both = weighted[..., 0:2] + weighted[..., 2:4]
    total = _DELTA * (lengths - function_words) + (1 - _DELTA) * function_words
    precision, recall = np.moveaxis(_divide(of_both, total), -1, 0)
    mean = _divide(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    fragmentation = _divide(sums[..., 20], (sums[..., 21] + sums[..., 22]) / 2)
    scores: Numbers = (mean * (1 - _GAMMA * fragmentation**_BETA))[..., None]
    return scores


def rouge_l(captions: Tokenized, references: Tokenized) -> Metric:
    """ROUGE-L (Lin 2004), the mean over images; arguments as of `bleu`."""
    rouge = Rouge()
    scores = [rouge.calc_score([caption], list(references[image_id])) for image_id, (caption,) in captions.items()]
    return _mean_of("ROUGE-L", scores)


def cider(captions: Tokenized, references: Tokenized) -> Metric:
    """CIDEr (Vedantam et al. 2015), the mean over images; arguments as of `bleu`.

    How much a word weighs follows from the references of all images here, and is not drawn anew with a resample.
    """
    with redirect_stdout(io.StringIO()):
        _, scores = Cider().compute_score(
            {image_id: list(texts) for image_id, texts in references.items()},
            {image_id: list(texts) for image_id, texts in captions.items()},
        )
    return _mean_of("CIDEr", scores)


def _mean_of(name: str, scores: Sequence[float] | Numbers) -> Metric:
    return ratio(name, scores, np.ones(len(scores)))


def ratio(
    name: str,
    numerators: Sequence[float] | Numbers,
    denominators: Sequence[float] | Numbers,
    finish: Callable[[Numbers], Numbers] = lambda quotient: quotient,
) -> Metric:
    """A sum over images divided by another, such as a mean.

    Args:
        name: of the score.
        numerators: one an image.
        denominators: one an image; where they add up to 0 there is no score.
        finish: from the quotient to the score, element by element.
    """
    rows = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], 1)
    return Metric((name,), rows, lambda sums: finish(_divide(sums[..., 0], sums[..., 1], np.nan))[..., None])


def _divide(numerator: Numbers, denominator: Numbers, empty: float = 0.0) -> Numbers:
    """The quotient, and `empty` where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, empty), where=denominator != 0)
