"""Defines the transform that distributes shards (files of a dataset) to workers. Several pipelines use it."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress

import apache_beam as beam
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import PBegin, PCollection
from apache_beam.transforms.combiners import Count

from captionlib.data.shards.markers import Marker
from captionlib.data.shards.stages import ProcessRows, ShardJob
from captionlib.errors import DatasetError

__all__ = ["ProcessShards"]

# One shard is computed while another is written. More than two would only use more GPU memory.
_SHARDS_PER_ACCELERATOR = "2"


class ProcessShards(beam.PTransform[PBegin, PCollection[int]]):
    """Processes the given shards of a job and then marks the job's output datasets as complete.

    The elements are shard numbers instead of images, so the Reshuffle moves little data.
    """

    def __init__(
        self, job: ShardJob, shards: Sequence[int], max_failure_ratio: float | None, accelerator: str | None = None
    ) -> None:
        super().__init__()
        self._job = job
        self._shards = shards
        self._max_failure_ratio = max_failure_ratio
        self._accelerator = accelerator

    def expand(self, begin: PBegin) -> PCollection[int]:
        process: beam.PTransform[PCollection[int], PCollection[Marker]] = beam.ParDo(_ProcessShard(self._job))
        if self._accelerator is not None:
            process = process.with_resource_hints(
                accelerator=self._accelerator, max_active_bundles_per_worker=_SHARDS_PER_ACCELERATOR
            )
        finished: PCollection[int] = (
            begin
            | "Shards" >> beam.Create(self._shards, reshuffle=False)
            | "Spread" >> beam.Reshuffle()
            | "Process" >> process
            | "Count" >> Count.Globally()
            | "Finish" >> beam.FlatMap(_finish, self._job, self._max_failure_ratio)
        )
        return finished


class _ProcessShard(beam.DoFn):
    def __init__(self, job: ShardJob) -> None:
        self._job = job
        self._images = Metrics.counter("ProcessShards", "images")
        self._failures = Metrics.counter("ProcessShards", "failures")

    def setup(self) -> None:
        self._exit_stack = ExitStack()
        self._process_rows: ProcessRows = self._exit_stack.enter_context(self._job.stage.open())

    def process(self, shard: int) -> list[Marker]:
        marker = self._job.run(shard, self._process_rows)
        self._images.inc(marker.images)
        self._failures.inc(marker.failures)
        return [marker]

    def teardown(self) -> None:
        self._exit_stack.close()


def _finish(shard_count: int, job: ShardJob, max_failure_ratio: float | None) -> list[int]:
    """Marks the outputs as complete. Runs on a worker, so it works even if the submitting process has died."""
    # An error would make Beam retry this step. The submitting process raises it instead.
    with suppress(DatasetError):
        job.finish(max_failure_ratio)
    return [shard_count]
