"""Writes the metrics of a run: `metrics.jsonl` for programs, event files for TensorBoard, and plots in `curves.png`."""

import json
from collections.abc import Sequence

from captionlib.storage.folders import Folder, scratch_folder

__all__ = ["CURVES", "METRICS", "TENSORBOARD", "log_epoch", "plot_curves"]

CURVES = "curves.png"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

_NOT_PLOTTED = frozenset({"epoch", "total_seconds", "learning_rate", "data_wait_fraction"})

Row = dict[str, float]  # metrics of an epoch


def log_epoch(output: Folder, history: Sequence[Row]) -> None:
    """Rewrites `metrics.jsonl` and writes the metrics of the last epoch to an event file in `tensorboard/`.

    Each epoch has its own event file, because object stores cannot append to files.
    """
    output.write(METRICS, "".join(json.dumps(row) + "\n" for row in history).encode())
    epoch = int(history[-1]["epoch"])
    output.write(f"{TENSORBOARD}/events.out.tfevents.{epoch:06d}.captionlib", _serialize_events(history[-1]))


def _serialize_events(row: Row) -> bytes:
    from tensorboardX import SummaryWriter

    with scratch_folder() as folder:
        with SummaryWriter(str(folder)) as writer:
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, int(row["epoch"]))
        (path,) = folder.iterdir()
        return path.read_bytes()


def plot_curves(output: Folder, history: Sequence[Row]) -> None:
    """Plots the loss and the validation scores of all epochs in `curves.png`."""
    from matplotlib.figure import Figure

    names = [name for name in history[0] if name not in _NOT_PLOTTED]
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(4.5 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.plot(epochs, [row[name] for row in history], marker="o", markersize=3)
        axes.set(title=name, xlabel="epoch")
        axes.grid(alpha=0.3)
    with output.stage(CURVES) as path:
        figure.savefig(path, format="png", dpi=120)
