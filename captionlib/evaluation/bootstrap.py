"""Computes scores of a set of images and of each image, and confidence intervals by resampling images (bootstrap)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeInt

from captionlib.config import configclass
from captionlib.evaluation.metrics import Metric

__all__ = ["BootstrapConfig", "Scores", "compute_scores"]


@configclass
class BootstrapConfig:
    """Percentile bootstrap intervals (Efron & Tibshirani 1993, chapter 13).

    Attributes:
        samples: the number of resamples of the set of images, with replacement. If 0, no intervals are computed.
        confidence: the confidence level, between 0 and 1.
        seed: the random seed; the same seed and images give the same intervals.
    """

    samples: NonNegativeInt = 1000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Scores:
    """Scores of a set of captioned images. All mappings are keyed by the name of the score.

    Attributes:
        overall: the score of the whole set. For BLEU, METEOR and perplexity, this is not the mean over images.
        per_image: the score of each image by image id; NaN if the score is undefined.
        intervals: the lower and upper bounds of the confidence interval of the overall score.
    """

    overall: Mapping[str, float]
    per_image: Mapping[str, Mapping[str, float]]
    intervals: Mapping[str, tuple[float, float]]


def compute_scores(metrics: Sequence[Metric], image_ids: Sequence[str], config: BootstrapConfig) -> Scores:
    """Computes scores from metrics, whose rows are in the order of `image_ids`.

    Scores that are undefined for the whole set are omitted.
    """
    sums = _resample(np.concatenate([metric.rows for metric in metrics], 1), config)
    widths = [metric.rows.shape[1] for metric in metrics]
    tail = (1 - config.confidence) / 2
    overall: dict[str, float] = {}
    per_image: dict[str, dict[str, float]] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for metric, resampled in zip(metrics, np.split(sums, np.cumsum(widths)[:-1], axis=1), strict=True):
        set_scores, image_scores = metric.formula(metric.rows.sum(0)), metric.formula(metric.rows)
        resampled_scores = metric.formula(resampled)
        for column, name in enumerate(metric.names):
            if np.isnan(set_scores[column]):
                continue
            overall[name] = float(set_scores[column])
            per_image[name] = dict(zip(image_ids, image_scores[:, column].tolist(), strict=True))
            if config.samples:
                low, high = np.nanquantile(resampled_scores[:, column], [tail, 1 - tail])
                intervals[name] = (float(low), float(high))
    return Scores(overall, per_image, intervals)


def _resample(rows: npt.NDArray[np.float64], config: BootstrapConfig) -> npt.NDArray[np.float64]:
    """Returns the sum of the rows of each resample, `[samples, statistics]`. Holds only one resample in memory."""
    generator = np.random.default_rng(config.seed)
    sums = np.empty((config.samples, rows.shape[1]))
    for sample in range(config.samples):
        sums[sample] = np.bincount(generator.integers(len(rows), size=len(rows)), minlength=len(rows)) @ rows
    return sums
