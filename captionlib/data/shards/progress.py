"""Shows the progress of a job, from the markers of finished shards and the progress files of unfinished ones."""

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
    """Shows a progress bar while the `with` block runs a job.

    The bar shows the images, images per second, the time left, the finished shards and the failures.

    Args:
        job: the job. Its workers write their progress to the folder of its first output.
        pending: numbers of the shards that the job processes. Ignored if the job also verifies finished shards.
        label: text before the bar.
        enabled: whether to show the bar.
    """
    if not enabled:
        yield
        return
    output = job.outputs[0]
    unfinished = set(job.unfinished_shards() if job.verify else pending)
    # Markers of old versions of shards, and progress files of killed runs, are ignored until they change.
    old_markers = output.read_markers(unfinished)
    old_progress = output.read_progress(unfinished)
    images = failures = shown = 0
    counted = set[int]()

    def advance(add: Callable[[int, str], None], shards: Set[int]) -> None:
        nonlocal images, failures, shown
        with suppress(StorageError):  # if the storage cannot be reached, the pipeline reports the error
            for marker in output.iter_markers((output.list_written_shards() & shards) - counted):
                if marker != old_markers.get(marker.shard):
                    counted.add(marker.shard)
                    failures += marker.failures
                    images += marker.images
            progress = output.read_progress(shards - counted)
            in_progress = sum(each.images for shard, each in progress.items() if each != old_progress.get(shard))
            added = max(0, images + in_progress - shown)  # the bar never moves back
            shown += added
            add(added, f"{len(counted)}/{output.shards} shards, {failures} failed")

    def watch() -> None:
        advance(bar.skip, set(range(output.shards)) - unfinished)  # finished shards do not count towards the rate
        pause = 1.0
        while not stop.wait(pause):
            started = time.monotonic()
            advance(bar.update, unfinished)
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
            advance(bar.update, unfinished)
