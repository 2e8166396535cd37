"""Runs a stage on a shard: turns input rows into output rows. Repeating it gives the same result."""

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
"""Records an image that failed: takes its id, its uri and the error."""

ProcessRows = Callable[[Iterator[pa.RecordBatch], ReportFailure], Iterator[tuple[pa.RecordBatch, ...]]]
"""Turns the rows of a shard into output rows in the same order. Yields one batch per output dataset at a time."""


class Stage(Protocol):
    """A step that processes the rows of a shard. It is pickled for workers, so it holds configuration, not models."""

    @property
    def columns(self) -> Sequence[str] | None:
        """The input columns that the stage reads; None reads all."""

    def open(self) -> AbstractContextManager[ProcessRows]:
        """Loads models in the worker process, once for many shards."""


@dataclass(frozen=True)
class ShardJob:
    """A stage with its complete input dataset, and its output datasets, which have as many shards.

    `retry_failures` processes the failed images of finished shards again.
    """

    source: ShardedDataset
    outputs: tuple[ShardedDataset, ...]
    stage: Stage
    retry_failures: bool = False

    def pending_shards(self) -> list[int]:
        """Returns the shards that need work."""
        pending = {shard for output in self.outputs for shard in output.pending_shards()}
        if self.retry_failures:
            pending |= {shard for shard, marker in self.outputs[0].read_markers().items() if marker.failures}
        return sorted(pending)

    def run(self, shard: int, process: ProcessRows) -> Marker:
        """Processes a shard, or only its failed images if it is finished and `retry_failures` is set.

        Returns:
            The marker of the first output.
        """
        markers = [output.read_marker(shard) for output in self.outputs]
        if markers[0] is None or None in markers:
            for output, done in zip(self.outputs, markers, strict=True):
                if done is not None:  # its rows are written again, and an old marker must not describe them
                    output.remove_marker(shard)
            with self._open_writers(shard) as writers:
                _fill(writers, process, self._read_input(shard))
            return writers[0].marker
        if self.retry_failures and markers[0].failures:
            return self._retry(shard, process) or markers[0]
        return markers[0]

    def mark_incomplete(self) -> None:
        """Marks the outputs as incomplete; see `ShardedDataset.mark_incomplete`."""
        for output in self.outputs:
            output.mark_incomplete()

    def finish(self, max_failure_ratio: float) -> Totals:
        """Marks the outputs as complete, the first one last; see `ShardedDataset.finish`."""
        return [output.finish(max_failure_ratio) for output in reversed(self.outputs)][-1]

    def _read_input(self, shard: int, image_ids: pa.Array | None = None) -> Iterator[pa.RecordBatch]:
        for rows in self.source.read_batches(shard, self.stage.columns):
            yield rows if image_ids is None else rows.filter(pc.is_in(rows["image_id"], value_set=image_ids))

    @contextmanager
    def _open_writers(self, shard: int) -> Iterator[list[ShardWriter]]:
        source_marker = self.source.read_marker(shard)
        if source_marker is None:
            raise DatasetError(f"{self.source.folder.uri}: {part_name(shard)} has no marker; write that dataset again")
        with ExitStack() as stack:  # exits in reverse order, so the first output is published last
            yield [stack.enter_context(write_shard(output, shard, source_marker.rows)) for output in self.outputs]

    def _retry(self, shard: int, process: ProcessRows) -> Marker | None:
        """Processes the failed images of a finished shard again and merges those that succeed into its rows.

        Holds the shard in memory. The marker is removed before the files change, so that the shard is pending if the
        run dies in between. Returns None if no image succeeded.
        """
        failures = self.outputs[0].read_failures(shard)
        assert failures is not None, "the marker counts failures"
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
