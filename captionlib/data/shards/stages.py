"""Runs a stage of the flow on one shard: input rows to output rows, again at any time, with the same result."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
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
"""Takes image id, uri and reason of an image that cannot be had."""

ProcessRows = Callable[[Iterator[pa.RecordBatch], ReportFailure], Iterator[tuple[pa.RecordBatch, ...]]]
"""Turns the rows of a shard into output rows, in the same order: for each output dataset a piece of its rows."""


class Stage(Protocol):
    """What is done to the rows of a shard. Travels to workers by pickle, so it holds configuration, not models."""

    @property
    def columns(self) -> Sequence[str] | None:
        """The input columns it needs, None for all."""

    def open(self) -> AbstractContextManager[ProcessRows]:
        """Loads what is heavy, once for many shards, in the process that does the work."""


@dataclass(frozen=True)
class ShardJob:
    """A stage, where its rows come from, and where they go.

    Attributes:
        source: a complete dataset.
        outputs: one or more datasets with as many shards, written side by side.
        stage: what is done.
        retry_failures: do the failed images of done shards again.
    """

    source: ShardedDataset
    outputs: tuple[ShardedDataset, ...]
    stage: Stage
    retry_failures: bool = False

    def pending_shards(self) -> list[int]:
        """The shards that there is something to do for."""
        pending = {shard for output in self.outputs for shard in output.pending_shards()}
        if self.retry_failures:
            pending |= {shard for shard, marker in self.outputs[0].read_markers().items() if marker.failures}
        return sorted(pending)

    def run(self, shard: int, process: ProcessRows) -> Marker:
        """Does one shard: all of it, or its failed images if it is done already and they are to be tried again.

        Args:
            shard: its number.
            process: what the stage opened.

        Returns:
            The marker of the first output.
        """
        markers = [output.read_marker(shard) for output in self.outputs]
        if markers[0] is None or None in markers:
            for output, done in zip(self.outputs, markers, strict=True):
                if done is not None:  # written again beside the others: never the old marker with new rows
                    output.remove_marker(shard)
            return self._write(shard, lambda writers: _fill(writers, process, self._input(shard)))
        if self.retry_failures and markers[0].failures:
            return self._retry(shard, process) or markers[0]
        return markers[0]

    def mark_incomplete(self) -> None:
        """Says that there is something to do; see `ShardedDataset.mark_incomplete`."""
        for output in self.outputs:
            output.mark_incomplete()

    def finish(self, max_failure_ratio: float) -> Totals:
        """Marks the outputs complete, the first last; see `ShardedDataset.finish`."""
        return [output.finish(max_failure_ratio) for output in reversed(self.outputs)][-1]

    def _input(self, shard: int, only: pa.Array | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of an input shard, or those of them with these ids."""
        for rows in self.source.read_batches(shard, self.stage.columns):
            yield rows if only is None else rows.filter(pc.is_in(rows["image_id"], value_set=only))

    def _write(self, shard: int, fill: Callable[[Sequence[ShardWriter]], None]) -> Marker:
        source_marker = self.source.read_marker(shard)
        if source_marker is None:
            raise DatasetError(f"{self.source.folder.uri}: {part_name(shard)} has no marker; write that dataset again")
        with ExitStack() as stack:  # closes in reverse: the first output is published last
            writers = [stack.enter_context(write_shard(output, shard, source_marker.rows)) for output in self.outputs]
            fill(writers)
        marker = writers[0].marker
        assert marker is not None, "a shard that was just written has a marker"
        return marker

    def _retry(self, shard: int, process: ProcessRows) -> Marker | None:
        """Processes the failed images of a done shard and puts those that work now among the others, if there are any.

        Holds one shard in memory. The shard loses its marker before its files change, so that a run that dies in
        between leaves a shard that is done again from its start.
        """
        failures = self.outputs[0].read_failures(shard)
        assert failures is not None, "a marker that counts failures stands beside them"
        still_failing: list[tuple[str, str, ImageError]] = []
        recovered = list(
            process(self._input(shard, failures["image_id"]), lambda *failure: still_failing.append(failure))
        )
        if not any(rows[0].num_rows for rows in recovered):
            return None
        order = pa.chunked_array([rows["image_id"] for rows in self.source.read_batches(shard, ["image_id"])])
        tables = []
        for number, output in enumerate(self.outputs):
            both = pa.concat_tables([output.read(shard), pa.Table.from_batches([rows[number] for rows in recovered])])
            positions = pc.index_in(both["image_id"], value_set=order)
            tables.append(both.take(pc.sort_indices(positions)))
        for output in self.outputs:
            output.remove_marker(shard)

        def fill(writers: Sequence[ShardWriter]) -> None:
            for writer, table in zip(writers, tables, strict=True):
                for rows in table.combine_chunks().to_batches():
                    writer.write(rows)
                for failure in still_failing:
                    writer.write_failure(*failure)

        return self._write(shard, fill)


def _fill(writers: Sequence[ShardWriter], process: ProcessRows, rows: Iterator[pa.RecordBatch]) -> None:
    def fail(image_id: str, uri: str, error: ImageError) -> None:
        for writer in writers:
            writer.write_failure(image_id, uri, error)

    for outputs in process(rows, fail):
        for writer, output in zip(writers, outputs, strict=True):
            writer.write(output)
