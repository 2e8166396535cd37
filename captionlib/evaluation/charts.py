"""Computes the coordinates and labels of SVG charts that show the metrics of a training run by epoch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Chart", "Sparkline", "build_charts", "build_sparkline"]

_NOT_PLOTTED = frozenset({"epoch", "step", "total_seconds", "learning_rate", "data_wait_fraction"})

_TRAINING_METRICS = frozenset({"loss", "reward"})  # all other metrics are computed on the validation splits


@dataclass(frozen=True)
class Chart:
    """A line chart of one metric over epochs, in the coordinates of an SVG image of `width` by `height`.

    `split` is the data that the metric is computed on: `training` or `validation`. `low`, `high`, `last` and `best` are
    values of the metric, formatted as text. `low` is plotted at `bottom`, and `high` at `top`. The epochs range from
    `left` to `right`.
    """

    name: str
    split: str
    points: Sequence[tuple[float, float]]
    low: str
    high: str
    last: str
    best: str
    best_point: tuple[float, float]
    first_epoch: int
    last_epoch: int
    width: int = 360
    height: int = 150
    left: int = 48
    right: int = 352
    top: int = 12
    bottom: int = 126

    @property
    def path(self) -> str:
        return "M" + " L".join(f"{x} {y}" for x, y in self.points)


def build_charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Returns a chart of each metric that is finite in more than one epoch. `history` has one row per epoch."""
    names = dict.fromkeys(name for row in history for name in row if name not in _NOT_PLOTTED)
    charts = []
    for name in names:
        series = [(int(row["epoch"]), row[name]) for row in history if "epoch" in row and _is_finite(row.get(name))]
        if len(series) > 1:
            charts.append(_build_chart(name, series))
    return charts


def _build_chart(name: str, series: Sequence[tuple[int, float]]) -> Chart:
    values = [value for _, value in series]
    low, high = min(values), max(values)
    first, last = series[0][0], series[-1][0]
    points = [
        (
            round(Chart.left + (Chart.right - Chart.left) * (epoch - first) / ((last - first) or 1), 1),
            round(Chart.bottom - (Chart.bottom - Chart.top) * (value - low) / ((high - low) or 1), 1),
        )
        for epoch, value in series
    ]
    best = low if any(word in name for word in ("loss", "perplexity", "rank")) else high
    split = "training" if name in _TRAINING_METRICS else "validation"
    return Chart(
        name,
        split,
        points,
        low=f"{low:.4g}",
        high=f"{high:.4g}",
        last=f"{values[-1]:.4g}",
        best=f"{best:.4g}",
        best_point=points[values.index(best)],
        first_epoch=first,
        last_epoch=last,
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Sparkline:
    """An area chart of equally spaced, non-negative values, in an SVG image that is stretched to the page's width."""

    path: str
    area: str  # `path`, closed along the bottom
    high: float
    width: int = 600
    height: int = 100


def build_sparkline(values: Sequence[float]) -> Sparkline:
    """Builds a chart of at least one value. Each value is drawn as a horizontal line segment."""
    high = max(values)
    step = Sparkline.width / len(values)
    heights = [round(Sparkline.height * (1 - value / (high or 1)), 1) for value in values]
    path = "M" + " L".join(
        f"{round(x, 1)} {y}" for index, y in enumerate(heights) for x in (index * step, (index + 1) * step)
    )
    return Sparkline(path, f"{path} L{Sparkline.width} {Sparkline.height} L0 {Sparkline.height} Z", high)
