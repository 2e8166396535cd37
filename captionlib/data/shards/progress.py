"""Shows how far a dataset is, counted from its markers, on whatever machines they are written."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.markers import Marker, sum_markers
from captionlib.errors import StorageError

__all__ = ["show_progress"]


@contextmanager
def show_progress(source: ShardedDataset, output: ShardedDataset, label: str, enabled: bool = True) -> Iterator[None]:
    """A bar of images, with shards, images/s, failures and the time left, while the block runs.

    Args:
        source: the dataset whose rows are to become rows or failures of `output`.
        output: the dataset that is being written.
        label: stands before the bar.
        enabled: off shows nothing.
    """
    if not enabled:
        yield
        return
    totals = source.recorded_totals() or source.totals()
    seldom = 0.1 if sys.stderr.isatty() else 30.0  # a log wants a line now and then, not an animation
    with tqdm(total=totals.rows, desc=label, unit="image", mininterval=seldom, dynamic_ncols=True) as bar:
        watch = _Watch(output, bar)
        stop = threading.Event()
        thread = threading.Thread(target=watch.run, args=(stop,), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            watch.update()


class _Watch:
    """Follows the markers of a dataset; what stood there before it began does not count into images/s."""

    def __init__(self, output: ShardedDataset, bar: "tqdm[Any]") -> None:
        self._output = output
        self._bar = bar
        self._failures = 0
        self._seen: set[int] = set()

    def run(self, stop: threading.Event) -> None:
        """Reads first what was there before: of many shards that takes a while, and nothing waits for it."""
        with suppress(StorageError):
            self._bar.initial = self._bar.n = self._add(self._output.done())
        pause = 1.0
        while not stop.wait(pause):
            began = time.monotonic()
            self.update()
            pause = max(1.0, 20 * (time.monotonic() - began))  # a slow listing takes 5% of the time at most

    def update(self) -> None:
        with suppress(StorageError):  # the work itself tells, if it cannot be done either
            self._bar.update(self._add(self._output.done() - self._seen))

    def _add(self, shards: set[int]) -> int:
        """Counts shards that were not counted before, and returns their images."""
        totals = sum_markers(self._noted(self._output.read_markers(shards)))
        self._failures += totals.failures
        shown = f"{len(self._seen)}/{self._output.shards} shards, {self._failures} failed"
        self._bar.set_postfix_str(shown, refresh=False)
        return totals.images

    def _noted(self, markers: Iterator[Marker]) -> Iterator[Marker]:
        for marker in markers:
            self._seen.add(marker.shard)
            yield marker
