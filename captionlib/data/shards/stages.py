"""Runs a stage (a step such as feature extraction) on one shard of a dataset. Running it again gives the same rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.markers import Marker, Totals, part_name
from captionlib.data.shards.writer import ShardWriter, write_shard
from captionlib.errors import DatasetError, ImageError

__all__ = ["ProcessRows", "ReportFailure", "ShardJob", "Stage"]

ReportFailure = Callable[[str, str, ImageError], None]
"""Records an image that could not be read. Takes its id, its path or URL, and the error."""

ProcessRows = Callable[[Iterator[pa.RecordBatch], ReportFailure], Iterator[tuple[pa.RecordBatch, ...]]]
"""Converts the rows of a shard to output rows in the same order. Yields tuples with a batch for each output dataset."""


class Stage(Protocol):
    """A step that processes the rows of a shard. It is pickled for workers, so it holds configurations, not models."""

    @property
    def columns(self) -> Sequence[str] | None:
        """The input columns that the stage reads. If None, it reads all columns."""

    def open(self) -> AbstractContextManager[ProcessRows]:
        """Loads models in a worker process, which then processes many shards with them."""


@dataclass(frozen=True)
class ShardJob:
    """A stage, its complete input dataset, and its output datasets, which have the same number of shards.

    If `retry_failures` is set, images that could not be read are processed again, in finished shards too.
    """

    source: ShardedDataset
    outputs: tuple[ShardedDataset, ...]
    stage: Stage
    retry_failures: bool = False

    def pending_shards(self) -> list[int]:
        """Returns the sorted numbers of the shards that still have to be processed."""
        pending = {shard for output in self.outputs for shard in output.pending_shards()}
        if self.retry_failures:
            pending |= {shard for shard, marker in self.outputs[0].read_markers().items() if marker.failures}
        return sorted(pending)

    def run(self, shard: int, process: ProcessRows) -> Marker:
        """Processes a shard. If it is finished, processes only its failed images, and only if `retry_failures` is set.

        Returns:
            The marker (record of a finished shard) of the first output.
        """
        markers = [output.read_marker(shard) for output in self.outputs]
        if markers[0] is None or None in markers:
            for output, done in zip(self.outputs, markers, strict=True):
                if done is not None:  # all outputs are written again, so the old marker is invalid
                    output.remove_marker(shard)
            with self._open_writers(shard) as writers:
                _fill(writers, process, self._read_input(shard))
            return writers[0].marker
        if self.retry_failures and markers[0].failures:
            return self._retry(shard, process) or markers[0]
        return markers[0]

    def mark_incomplete(self) -> None:
        """Marks the output datasets as incomplete; see `ShardedDataset.mark_incomplete`."""
        for output in self.outputs:
            output.mark_incomplete()

    def finish(self, max_failure_ratio: float | None = None) -> Totals:
        """Marks the output datasets as complete, in reverse order; see `ShardedDataset.finish`."""
        return [output.finish(max_failure_ratio) for output in reversed(self.outputs)][-1]

    def _read_input(self, shard: int, image_ids: pa.Array | None = None) -> Iterator[pa.RecordBatch]:
        for rows in self.source.read_batches(shard, self.stage.columns):
            yield rows if image_ids is None else rows.filter(pc.is_in(rows["image_id"], value_set=image_ids))

    @contextmanager
    def _open_writers(self, shard: int) -> Iterator[list[ShardWriter]]:
        source_marker = self.source.read_marker(shard)
        if source_marker is None:
            raise DatasetError(f"{self.source.folder.uri}: {part_name(shard)} has no marker; write this dataset again")
        with ExitStack() as stack:  # exits in reverse order and publishes the first output last
            yield [stack.enter_context(write_shard(output, shard, source_marker.rows)) for output in self.outputs]

    def _retry(self, shard: int, process: ProcessRows) -> Marker | None:
        """Processes the failed images of a finished shard again and merges the new rows into the shard.

        Holds the shard in memory. The marker is removed before the files change, so that the shard is pending if the
        run dies in between. Returns None if all images failed again.
        """
        failures = self.outputs[0].read_failures(shard)
        assert failures is not None, "the marker records failures"
        still_failing: list[tuple[str, str, ImageError]] = []
        recovered = list(
            process(self._read_input(shard, failures["image_id"]), lambda *failure: still_failing.append(failure))
        )
        if not any(rows[0].num_rows for rows in recovered):
            return None
        order = pa.chunked_array([rows["image_id"] for rows in self.source.read_batches(shard, ["image_id"])])
        tables = []
        for number, output in enumerate(self.outputs):
            merged = pa.concat_tables([output.read(shard), pa.Table.from_batches([rows[number] for rows in recovered])])
            positions = pc.index_in(merged["image_id"], value_set=order)
            tables.append(merged.take(pc.sort_indices(positions)))
        for output in self.outputs:
            output.remove_marker(shard)
        with self._open_writers(shard) as writers:
            for writer, table in zip(writers, tables, strict=True):
                for rows in table.combine_chunks().to_batches():
                    writer.write(rows)
                for failure in still_failing:
                    writer.write_failure(*failure)
        return writers[0].marker


def _fill(writers: Sequence[ShardWriter], process: ProcessRows, rows: Iterator[pa.RecordBatch]) -> None:
    def fail(image_id: str, uri: str, error: ImageError) -> None:
        for writer in writers:
            writer.write_failure(image_id, uri, error)

    for outputs in process(rows, fail):
        for writer, output in zip(writers, outputs, strict=True):
            writer.write(output)
