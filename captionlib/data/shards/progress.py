"""Shows the progress of a dataset by watching its markers, whichever machines write them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from captionlib.data.shards.dataset import ShardedDataset
from captionlib.errors import StorageError
from captionlib.progress import ProgressBar, progress_bar

__all__ = ["show_progress"]


@contextmanager
def show_progress(source: ShardedDataset, output: ShardedDataset, label: str, enabled: bool = True) -> Iterator[None]:
    """Shows images, images/s, the time left, shards and failures while the block runs.

    Args:
        source: the dataset whose rows become rows or failures of `output`.
        output: the dataset that is being written.
        label: names the work.
        enabled: False shows nothing.
    """
    if not enabled:
        yield
        return
    totals = source.read_totals() or source.compute_totals()
    with progress_bar(label, totals.rows, "images") as bar:
        watcher = _MarkerWatcher(output, bar)
        stop = threading.Event()
        thread = threading.Thread(target=watcher.run, args=(stop,), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            watcher.update()


class _MarkerWatcher:
    """Adds the images of new markers to a progress bar."""

    def __init__(self, output: ShardedDataset, bar: ProgressBar) -> None:
        self._output = output
        self._bar = bar
        self._failures = 0
        self._seen: set[int] = set()

    def run(self, stop: threading.Event) -> None:
        """Updates the bar until `stop` is set. Markers of earlier runs do not count towards the rate."""
        self._count(self._bar.skip)
        pause = 1.0
        while not stop.wait(pause):
            started = time.monotonic()
            self.update()
            pause = max(1.0, 20 * (time.monotonic() - started))  # slow listings take at most 5% of the time

    def update(self) -> None:
        self._count(self._bar.update)

    def _count(self, add: Callable[[int, str], None]) -> None:
        with suppress(StorageError):  # the pipeline reports it if it cannot reach the storage either
            images = 0
            for marker in self._output.iter_markers(self._output.done_shards() - self._seen):
                self._seen.add(marker.shard)
                self._failures += marker.failures
                images += marker.images
            add(images, f"{len(self._seen)}/{self._output.shards} shards, {self._failures} failed")
