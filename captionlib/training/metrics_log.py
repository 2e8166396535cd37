"""The metrics of a run: `metrics.jsonl` for programs, event files for TensorBoard."""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from captionlib.storage.folders import Folder

__all__ = ["METRICS", "TENSORBOARD", "log_epoch"]

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

Row = dict[str, float]


def log_epoch(output: Folder, history: Sequence[Row]) -> None:
    """Rewrites `metrics.jsonl` and writes the metrics of the last epoch to an event file in `tensorboard/`.

    Each epoch has its own event file, because files in object stores cannot grow. An epoch that is repeated after a
    crash replaces its file.

    Args:
        output: the run's folder.
        history: the metrics of each epoch.
    """
    output.write(METRICS, "".join(json.dumps(row) + "\n" for row in history).encode())
    epoch = int(history[-1]["epoch"])
    output.write(f"{TENSORBOARD}/events.out.tfevents.{epoch:06d}.captionlib", _serialize_events(history[-1]))


def _serialize_events(row: Row) -> bytes:
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory(prefix="captionlib-") as folder:
        with SummaryWriter(folder) as writer:
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, int(row["epoch"]), walltime=time.time())
        (path,) = Path(folder).iterdir()
        return path.read_bytes()
