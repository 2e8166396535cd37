"""Shows the progress of writing a dataset. It counts the images of finished shards and of shards in progress."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager, suppress

from captionlib.data.shards.stages import ShardJob
from captionlib.errors import StorageError
from captionlib.progress import progress_bar

__all__ = ["show_progress"]


@contextmanager
def show_progress(job: ShardJob, pending: Collection[int], label: str, enabled: bool = True) -> Iterator[None]:
    """Shows images, images/s, the time left, shards and failures while the block processes the pending shards."""
    if not enabled:
        yield
        return
    output = job.outputs[0]
    unfinished = set(job.unfinished_shards() if job.verify else pending)
    stale = output.read_markers(unfinished)  # such a shard is counted as soon as its marker changes
    stale_progress = output.read_progress(unfinished)  # an earlier run was killed
    images = failures = shown = 0
    counted = set[int]()

    def count(add: Callable[[int, str], None], shards: Set[int]) -> None:
        """Adds the images of new markers and of shards in progress to the bar. The count never decreases."""
        nonlocal images, failures, shown
        with suppress(StorageError):  # if the storage cannot be reached, the pipeline reports the error
            for marker in output.iter_markers((output.done_shards() & shards) - counted):
                if marker != stale.get(marker.shard):
                    counted.add(marker.shard)
                    failures += marker.failures
                    images += marker.images
            progress = output.read_progress(shards - counted)
            in_progress = sum(count for shard, count in progress.items() if count != stale_progress.get(shard))
            added = max(0, images + in_progress - shown)
            shown += added
            add(added, f"{len(counted)}/{output.shards} shards, {failures} failed")

    def watch() -> None:
        count(bar.skip, set(range(output.shards)) - unfinished)  # shards of earlier runs do not count towards the rate
        pause = 1.0
        while not stop.wait(pause):
            started = time.monotonic()
            count(bar.update, unfinished)
            pause = max(1.0, 20 * (time.monotonic() - started))  # listing takes at most 5% of the time

    totals = job.source.read_totals() or job.source.compute_totals()
    with progress_bar(label, totals.rows, "images") as bar:
        stop = threading.Event()
        thread = threading.Thread(target=watch, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            count(bar.update, unfinished)
