"""Shows how far a dataset is, counted from its markers, on whatever machines they are written."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from captionlib.data.shards import Marker, ShardedDataset

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
    total = source.totals().rows
    seldom = 0.1 if sys.stderr.isatty() else 30.0  # a log wants a line now and then, not an animation
    with tqdm(total=total, desc=label, unit="image", mininterval=seldom, dynamic_ncols=True) as bar:
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
        self._seen: dict[int, Marker] = output.markers()
        done = sum(marker.rows + marker.failures for marker in self._seen.values())
        bar.initial = bar.n = done
        self._show()

    def run(self, stop: threading.Event) -> None:
        pause = 1.0
        while not stop.wait(pause):
            began = time.monotonic()
            self.update()
            pause = max(1.0, 20 * (time.monotonic() - began))  # a slow listing takes 5% of the time at most

    def update(self) -> None:
        new = self._output.markers(self._output.done() - set(self._seen))
        self._seen.update(new)
        self._show()
        self._bar.update(sum(marker.rows + marker.failures for marker in new.values()))

    def _show(self) -> None:
        failures = sum(marker.failures for marker in self._seen.values())
        self._bar.set_postfix_str(f"{len(self._seen)}/{self._output.shards} shards, {failures} failed", refresh=False)
