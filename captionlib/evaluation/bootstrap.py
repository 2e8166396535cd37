"""Scores of a set, of each image, and confidence intervals by resampling the images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from captionlib.errors import ConfigError
from captionlib.evaluation.metrics import Metric

__all__ = ["BootstrapConfig", "Summary", "summarize"]


@dataclass(frozen=True)
class BootstrapConfig:
    """How confidence intervals are made (Efron & Tibshirani 1993, chapter 13: the percentile interval).

    Attributes:
        samples: resamples of as many images as there are, drawn with replacement; 0 leaves the intervals out.
        confidence: how often the interval holds the score of another such set of images.
        seed: of the resamples; the same images get the same intervals.
    """

    samples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ConfigError(f"samples: expected at least 0, got {self.samples}")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence: expected more than 0 and less than 1, got {self.confidence}")


@dataclass(frozen=True)
class Summary:
    """The scores of a set of images, by name.

    Attributes:
        scores: of the whole set.
        of_images: of each image by its id; not a number where it has none.
        intervals: the lower and the upper end of the confidence interval.
    """

    scores: Mapping[str, float]
    of_images: Mapping[str, Mapping[str, float]]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def summarize(metrics: Sequence[Metric], image_ids: Sequence[str], config: BootstrapConfig) -> Summary:
    """The scores of metrics; those that have no value for the whole set are left out.

    Args:
        metrics: with a row for each of `image_ids`.
        image_ids: whose rows they are.
        config: of the intervals.
    """
    sums = _resample(np.concatenate([metric.rows for metric in metrics], 1), config)
    widths = [metric.rows.shape[1] for metric in metrics]
    scores: dict[str, float] = {}
    of_images: dict[str, dict[str, float]] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for metric, drawn in zip(metrics, np.split(sums, np.cumsum(widths)[:-1], axis=1), strict=True):
        of_set, of_each = metric.formula(metric.rows.sum(0)), metric.formula(metric.rows)
        of_samples = metric.formula(drawn)
        for number, name in enumerate(metric.names):
            if np.isnan(of_set[number]):
                continue
            scores[name] = float(of_set[number])
            of_images[name] = dict(zip(image_ids, of_each[:, number].tolist(), strict=True))
            if config.samples:
                tail = (1 - config.confidence) / 2
                low, high = np.nanquantile(of_samples[:, number], [tail, 1 - tail])
                intervals[name] = (float(low), float(high))
    return Summary(scores, of_images, intervals)


def _resample(rows: npt.NDArray[np.float64], config: BootstrapConfig) -> npt.NDArray[np.float64]:
    """The sums of the rows of each resample, `[samples, statistics]`; memory holds one resample's counts."""
    generator = np.random.default_rng(config.seed)
    count = len(rows)
    sums = np.empty((config.samples, rows.shape[1]))
    for sample in range(config.samples):
        drawn = np.bincount(generator.integers(count, size=count), minlength=count)
        sums[sample] = drawn @ rows
    return sums
