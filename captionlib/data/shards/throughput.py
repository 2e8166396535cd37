"""Computes the speed of a job from the times in its markers and progress files.

A marker records a finished shard. A progress file records how much of an unfinished shard has been processed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from captionlib.data.shards.markers import Marker, ShardProgress, parse_time

__all__ = ["IDLE_SECONDS", "Throughput", "measure_throughput"]

IDLE_SECONDS = 300.0
"""A job without activity for longer than this counts as stopped. Workers report progress much more often."""

_RATE_SECONDS = 900.0  # the current speed is an average over this time
_CURVE_POINTS = 60

_Spans = npt.NDArray[np.float64]  # `[spans, 3]`: start, end, and the number of images processed in between


@dataclass(frozen=True)
class Throughput:
    """The speed of the current or last run of a job. Times are Unix times in seconds.

    Attributes:
        started: the start of the run. A pause of more than `IDLE_SECONDS` separates two runs.
        last_activity: when a worker last finished a shard or reported progress.
        images_per_second: the speed over the last 15 minutes before `last_activity`.
        curve: the speed, in images per second, in intervals of equal length from `started` to `last_activity`.
    """

    started: float
    last_activity: float
    images_per_second: float
    curve: list[float]


def measure_throughput(markers: Iterable[Marker], progress: Iterable[ShardProgress]) -> Throughput | None:
    """Measures the speed of a job, as if the speed was constant in each shard. Returns None if no time is known."""
    spans = _select_last_run(_list_spans(markers, progress))
    if not len(spans):
        return None
    started, ended = float(spans[:, 0].min()), float(spans[:, 1].max())
    edges = np.linspace(started, ended, _CURVE_POINTS + 1)
    recent = np.array([max(started, ended - _RATE_SECONDS), ended])
    return Throughput(
        started, ended, float(_compute_rates(spans, recent)[0]), [float(rate) for rate in _compute_rates(spans, edges)]
    )


def _list_spans(markers: Iterable[Marker], progress: Iterable[ShardProgress]) -> _Spans:
    spans = []
    for marker in markers:
        if marker.finished:
            end = parse_time(marker.finished)
            spans.append((end - marker.seconds, end, marker.images))
    spans += [(parse_time(each.started), parse_time(each.updated), each.images) for each in progress]
    array = np.array(spans, np.float64).reshape(-1, 3)
    array[:, 1] = np.maximum(array[:, 1], array[:, 0] + 0.001)  # times have a resolution of a millisecond
    return array


def _select_last_run(spans: _Spans) -> _Spans:
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    pauses = spans[1:, 0] - np.maximum.accumulate(spans[:, 1])[:-1]
    (starts,) = np.nonzero(pauses > IDLE_SECONDS)
    return spans[starts[-1] + 1 :] if len(starts) else spans


def _compute_rates(spans: _Spans, edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the images per second in each interval between two neighboring `edges`."""
    start, end, images = spans.T
    lower, upper = edges[:-1, None], edges[1:, None]
    overlaps = np.clip(np.minimum(end, upper) - np.maximum(start, lower), 0, None)
    rates: npt.NDArray[np.float64] = (overlaps * images / (end - start)).sum(1) / (edges[1:] - edges[:-1])
    return rates
