"""Computes scores of a set of images and of each image, and confidence intervals by resampling images (bootstrap)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeInt

from captionlib.config import configclass
from captionlib.evaluation.metrics import Metric

__all__ = ["BootstrapConfig", "Scores", "compare_scores", "compute_scores"]


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
    """Scores of a set of captioned images. All mappings are keyed by the name of the score."""

    overall: Mapping[str, float]  # for BLEU, METEOR and perplexity, this is not the mean over images
    per_image: Mapping[str, Mapping[str, float]]  # by image id; NaN if undefined
    intervals: Mapping[str, tuple[float, float]]  # bounds of the confidence interval of the overall score
    resampled: Mapping[str, npt.NDArray[np.float64]] = field(compare=False)  # overall score of each resample, [samples]


def compute_scores(metrics: Sequence[Metric], image_ids: Sequence[str], config: BootstrapConfig) -> Scores:
    """Computes scores from metrics of these images. Scores that are undefined for the whole set are omitted.

    A metric has one row of statistics for each image, and a formula that computes scores from a sum of rows.
    """
    sums = _resample(np.concatenate([metric.rows for metric in metrics], 1), config)
    widths = [metric.rows.shape[1] for metric in metrics]
    overall: dict[str, float] = {}
    per_image: dict[str, dict[str, float]] = {}
    intervals: dict[str, tuple[float, float]] = {}
    all_resampled: dict[str, npt.NDArray[np.float64]] = {}
    for metric, resampled in zip(metrics, np.split(sums, np.cumsum(widths)[:-1], axis=1), strict=True):
        set_scores, image_scores = metric.formula(metric.rows.sum(0)), metric.formula(metric.rows)
        resampled_scores = metric.formula(resampled)
        for column, name in enumerate(metric.names):
            if np.isnan(set_scores[column]):
                continue
            overall[name] = float(set_scores[column])
            per_image[name] = dict(zip(image_ids, image_scores[:, column].tolist(), strict=True))
            if config.samples:
                all_resampled[name] = resampled_scores[:, column]
                intervals[name] = _compute_interval(resampled_scores[:, column], config)
    return Scores(overall, per_image, intervals, all_resampled)


def compare_scores(scores: Scores, baseline: Scores, config: BootstrapConfig) -> dict[str, tuple[float, float]]:
    """Returns the confidence interval of the difference `scores - baseline` of each score that both have.

    Both must be scores of the same images in the same order, computed with this configuration. They then use the same
    resamples (paired bootstrap).
    """
    return {
        name: _compute_interval(resampled - baseline.resampled[name], config)
        for name, resampled in scores.resampled.items()
        if name in baseline.resampled
    }


def _compute_interval(resampled: npt.NDArray[np.float64], config: BootstrapConfig) -> tuple[float, float]:
    tail = (1 - config.confidence) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _resample(rows: npt.NDArray[np.float64], config: BootstrapConfig) -> npt.NDArray[np.float64]:
    """Returns the sum of the rows of each resample, `[samples, statistics]`. Holds only one resample in memory."""
    generator = np.random.default_rng(config.seed)
    sums = np.empty((config.samples, rows.shape[1]))
    for sample in range(config.samples):
        sums[sample] = np.bincount(generator.integers(len(rows), size=len(rows)), minlength=len(rows)) @ rows
    return sums
