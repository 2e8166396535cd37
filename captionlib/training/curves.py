"""Plots of the metrics of a run."""

from collections.abc import Sequence
from typing import Any

from captionlib.storage.folders import Folder

__all__ = ["CURVES", "draw_curves"]

CURVES = "curves.png"


def draw_curves(output: Folder, history: Sequence[dict[str, Any]]) -> None:
    """Draws the loss and the validation scores over the epochs to `curves.png`.

    Args:
        output: the run's folder.
        history: the metrics of each epoch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in history[0] if name not in {"epoch", "seconds", "learning_rate", "data_wait"}]
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(4.5 * len(names), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.plot(epochs, [row[name] for row in history], marker="o", markersize=3)
        axes.set(title=name, xlabel="epoch")
        axes.grid(alpha=0.3)
    with output.stage(CURVES) as path:
        figure.savefig(path, format="png", dpi=120)
