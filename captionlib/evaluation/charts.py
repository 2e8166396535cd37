"""Curves of a training run as lines that a page draws."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Chart", "draw_charts"]

_NO_CURVES = frozenset({"epoch", "step", "seconds", "learning_rate", "data_wait"})


@dataclass(frozen=True)
class Chart:
    """A curve over the epochs, in the units of an SVG of `width` by `height`.

    Attributes:
        name: what it is of.
        points: of each epoch.
        low: the lowest value, as text; it stands at `bottom`.
        high: the highest, at `top`.
        last: the value at the end.
        best: the best value: the lowest of a loss or a perplexity, the highest of a score.
        first_epoch: at `left`.
        last_epoch: at `right`.
    """

    name: str
    points: Sequence[tuple[float, float]]
    low: str
    high: str
    last: str
    best: str
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


def draw_charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A chart of each value that a training run told epoch by epoch; those told only once are no curve."""
    names = dict.fromkeys(name for row in history for name in row if name not in _NO_CURVES)
    charts = []
    for name in names:
        told = [(int(row["epoch"]), row[name]) for row in history if "epoch" in row and _is_finite(row.get(name))]
        if len(told) > 1:
            charts.append(_draw(name, told))
    return charts


def _draw(name: str, told: Sequence[tuple[int, float]]) -> Chart:
    values = [value for _, value in told]
    low, high = min(values), max(values)
    first, last = told[0][0], told[-1][0]
    points = [
        (
            round(Chart.left + (Chart.right - Chart.left) * (epoch - first) / ((last - first) or 1), 1),
            round(Chart.bottom - (Chart.bottom - Chart.top) * (value - low) / ((high - low) or 1), 1),
        )
        for epoch, value in told
    ]
    best = low if any(word in name for word in ("loss", "perplexity")) else high
    return Chart(name, points, _short(low), _short(high), _short(values[-1]), _short(best), first, last)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: float) -> str:
    return f"{value:.4g}"
