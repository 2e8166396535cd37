"""What training reports while it runs: a line an epoch for programs, events for TensorBoard."""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from captionlib.storage.folders import Folder

__all__ = ["METRICS", "TENSORBOARD", "report_epoch"]

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

Row = dict[str, float]


def report_epoch(output: Folder, history: Sequence[Row]) -> None:
    """Writes `metrics.jsonl` anew, and the last epoch's numbers as an event file of its own in `tensorboard/`.

    A file an epoch, because files on an object store cannot grow; and an epoch that is repeated after the machine died
    replaces its file.

    Args:
        output: the run's folder.
        history: one mapping an epoch, the last of them new.
    """
    output.write(METRICS, "".join(json.dumps(row) + "\n" for row in history).encode())
    epoch = int(history[-1]["epoch"])
    output.write(f"{TENSORBOARD}/events.out.tfevents.{epoch:06d}.captionlib", _event_file(history[-1]))


def _event_file(row: Row) -> bytes:
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory(prefix="captionlib-") as folder:
        with SummaryWriter(folder) as writer:
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, int(row["epoch"]), walltime=time.time())
        (path,) = Path(folder).iterdir()
        return path.read_bytes()
