"""Runs a stage, a step such as feature extraction, on the shards of a dataset.

A finished shard has a marker, the JSON file that records that the shard is complete.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.markers import Marker, Totals, part_name
from captionlib.data.shards.schemas import FAILURES_SCHEMA, add_missing_columns
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DamagedShardError, DatasetError, ImageError

__all__ = ["ProcessRows", "ReportFailure", "ShardJob", "Stage", "match_images", "replace_columns"]

ReportFailure = Callable[[Mapping[str, Any], ImageError], None]
"""Records an image that could not be read. Takes the input row of the image, and the error."""

ProcessRows = Callable[[Iterator[pa.RecordBatch], ReportFailure], Iterator[tuple[pa.RecordBatch, ...]]]
"""Converts the rows of a shard to output rows in the same order. Yields tuples with a batch for each output dataset."""


class Stage(Protocol):
    """A step that processes the rows of a shard. It is pickled for workers, so it holds configurations, not models."""

    @property
    def columns(self) -> Sequence[str] | None:
        """The input columns that the stage reads. If None, it reads all columns."""

    def open(self) -> AbstractContextManager[ProcessRows]:
        """Loads models and yields the function that processes rows. A worker process calls it once, for many shards."""


@dataclass(frozen=True)
class ShardJob:
    """A stage, its complete input dataset, and its output datasets, which have the same number of shards.

    A finished shard is stale if its input shard has changed since. When a shard is processed again, the rows and
    failures (unreadable images) of unchanged images are copied from the old output.

    Attributes:
        retry_failures: retry the images that could not be read, including those of finished shards.
        verify: verify the checksums of finished shards, and process damaged ones again.
    """

    source: ShardedDataset
    outputs: tuple[ShardedDataset, ...]
    stage: Stage
    retry_failures: bool = False
    verify: bool = False

    def plan(self) -> Iterator[list[int]]:
        """Yields up to two lists of shards to process. The caller processes the first before it requests the second.

        Listing files is fast, but reading the markers of many finished shards is slow. Therefore, the first list
        contains the shards that lack a marker or a data file, and the second list the other shards to process.
        """
        if missing := self._find_missing():
            yield missing
        if pending := self.pending_shards(missing):
            yield pending

    def pending_shards(self, processed: Collection[int] = ()) -> list[int]:
        """Returns the sorted numbers of the shards to process, except for those in `processed`."""
        if self.verify:
            return list(range(self.source.shards))  # workers verify them in parallel
        return self.unfinished_shards(processed)

    def unfinished_shards(self, processed: Collection[int] = ()) -> list[int]:
        """Returns those of `pending_shards` that are unfinished, are stale, or have failures to retry."""
        shards = sorted(set(range(self.source.shards)) - set(processed))
        if not shards:
            return []
        outputs = [output.read_markers(shards) for output in self.outputs]
        input_markers = self.source.read_markers(outputs[0])
        return [
            shard
            for shard in shards
            if not self._is_finished(input_markers.get(shard), [markers.get(shard) for markers in outputs])
        ]

    def _find_missing(self) -> list[int]:
        """Returns the first list of `plan`.

        If shards with both files may need processing too, the first list is empty, so that a cluster is started once.
        """
        checksum = self.source.compute_content_checksum()
        if self.verify or self.retry_failures or any(output.source_checksum != checksum for output in self.outputs):
            return []
        written = [output.list_written_shards() for output in self.outputs]
        return [shard for shard in range(self.source.shards) if any(shard not in shards for shards in written)]

    def run(self, shard: int, process: ProcessRows) -> Marker:
        """Processes a shard, unless it is finished.

        Args:
            shard: number of the shard.
            process: the function that `Stage.open` yields.

        Returns:
            The marker of the first output.

        Raises:
            DamagedShardError: the input shard is damaged.
            DatasetError: the input shard is not finished.
        """
        while True:
            input_marker = self.source.read_marker(shard)
            if input_marker is None:
                raise DatasetError(
                    f"{self.source.folder.uri}: {part_name(shard)} is not finished; rerun the command that writes this "
                    "dataset"
                )
            markers = [output.read_marker(shard) for output in self.outputs]
            intact = not (self.verify and any(output.find_damage(shard) for output in self.outputs))
            if markers[0] is not None and self._is_finished(input_marker, markers) and intact:
                return markers[0]
            try:
                return self._process(shard, input_marker, process)
            except DamagedShardError:
                if self.source.read_marker(shard) == input_marker:
                    raise  # otherwise the input was replaced meanwhile, so the new version is processed

    def mark_incomplete(self) -> None:
        for output in self.outputs:
            output.mark_incomplete()

    def finish(self, max_failure_ratio: float | None = None) -> Totals:
        """Marks the output datasets as complete, in reverse order; see `ShardedDataset.finish`."""
        return [output.finish(max_failure_ratio) for output in reversed(self.outputs)][-1]

    def _is_finished(self, input_marker: Marker | None, markers: Sequence[Marker | None]) -> bool:
        return input_marker is not None and all(
            marker is not None
            and marker.input_checksum == input_marker.checksum
            and not (self.retry_failures and marker.failures)
            for marker in markers
        )

    def _process(self, shard: int, input_marker: Marker, process: ProcessRows) -> Marker:
        unchanged = self._find_unchanged(shard, input_marker)
        with ExitStack() as stack:  # exits in reverse order and publishes the first output last
            writers = [
                stack.enter_context(write_shard(output, shard, input_marker.rows, input_marker.checksum))
                for output in self.outputs
            ]

            def record_failure(row: Mapping[str, Any], error: ImageError) -> None:
                for writer in writers:
                    writer.write_failure(row, error)

            if unchanged is None:
                rows = self.source.read_batches(shard, self.stage.columns, marker=input_marker)
                results = process(rows, record_failure)
            else:
                rows = self._read_rows(shard, input_marker, unchanged.is_pending)
                results = unchanged.merge(process(rows, record_failure) if any(unchanged.is_pending) else iter(()))
                for writer in writers:
                    writer.failures += unchanged.failures.to_pylist()
            for batches in results:
                for writer, batch in zip(writers, batches, strict=True):
                    writer.write(batch)
            if unchanged is not None:
                for writer in writers:
                    writer.failures.sort(key=lambda row: unchanged.positions[str(row["image_id"])])
        return writers[0].marker

    def _read_rows(self, shard: int, input_marker: Marker, selected: npt.NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
        start = 0
        for rows in self.source.read_batches(shard, self.stage.columns, marker=input_marker):
            if (mask := selected[start : start + rows.num_rows]).any():
                yield rows.filter(pa.array(mask))
            start += rows.num_rows

    def _find_unchanged(self, shard: int, input_marker: Marker) -> "_UnchangedRows | None":
        """Returns the rows and failures of unchanged images; None if there is no undamaged old output."""
        if self.verify and any(_has_damaged_data(output, shard) for output in self.outputs):
            return None
        try:
            outputs = [output.read(shard) for output in self.outputs]
        except DamagedShardError:  # also raised if the shard is missing or not finished
            return None
        copied_columns = [
            name for name in self.source.schema.names if any(name in output.schema.names for output in outputs)
        ]
        rows = self.source.read(shard, copied_columns, input_marker)
        failures = FAILURES_SCHEMA.empty_table()
        if not self.retry_failures:
            with suppress(DamagedShardError):  # then these images are processed again
                failures = self.outputs[0].read_failures(shard) or failures
        return _UnchangedRows.find(rows, outputs, failures)


@dataclass(frozen=True)
class _UnchangedRows:
    """The part of the old output of a shard that is still valid.

    Attributes:
        positions: position of each image id in the input.
        kept: positions of the unchanged rows in the input, ascending.
        tables: the unchanged rows of each output. Columns that the input also has are copied from the input.
        failures: the unchanged failures.
        is_pending: for each row of the input, whether it must be processed.
    """

    positions: Mapping[str, int]
    kept: npt.NDArray[np.int64]
    tables: Sequence[pa.Table]
    failures: pa.Table
    is_pending: npt.NDArray[np.bool_]

    @classmethod
    def find(cls, rows: pa.Table, outputs: Sequence[pa.Table], failures: pa.Table) -> "_UnchangedRows":
        output_indices = [match_images(rows, output) for output in outputs]
        is_kept = np.all([indices >= 0 for indices in output_indices], axis=0)
        failure_indices = np.where(is_kept, -1, match_images(rows, failures))
        has_failed = failure_indices >= 0
        kept = np.flatnonzero(is_kept)
        return cls(
            {image_id: position for position, image_id in enumerate(rows["image_id"].to_pylist())},
            kept,
            [
                replace_columns(output.take(indices[kept]), rows.take(kept))
                for output, indices in zip(outputs, output_indices, strict=True)
            ],
            replace_columns(failures.take(failure_indices[has_failed]), rows.filter(pa.array(has_failed))),
            ~is_kept & ~has_failed,
        )

    def merge(self, computed: Iterator[tuple[pa.RecordBatch, ...]]) -> Iterator[tuple[pa.RecordBatch, ...]]:
        """Merges the computed and the unchanged rows, which are both in the order of the input."""
        start = 0
        for batches in computed:
            positions = np.array(
                [self.positions[image_id] for image_id in batches[0]["image_id"].to_pylist()], np.int64
            )
            stop = start + int(np.searchsorted(self.kept[start:], positions.max(initial=-1)))
            order = np.argsort(np.concatenate([self.kept[start:stop], positions]))
            yield tuple(
                _to_batch(
                    pa.concat_tables(
                        [
                            table.slice(start, stop - start),
                            pa.Table.from_batches([add_missing_columns(batch, table.schema)]),
                        ]
                    ).take(order)
                )
                for table, batch in zip(self.tables, batches, strict=True)
            )
            start = stop
        yield tuple(_to_batch(table.slice(start)) for table in self.tables)


def _has_damaged_data(dataset: ShardedDataset, shard: int) -> bool:
    """Compares the whole data file with its checksum. The markers of early versions have none for its blocks."""
    marker = dataset.read_marker_even_if_unfinished(shard)
    return marker is not None and dataset.find_data_damage(shard, marker) != ""


def match_images(rows: pa.Table, old: pa.Table) -> npt.NDArray[np.int64]:
    """Returns for each row the index of the old row of the same, unchanged image, or -1 if there is none.

    An image is unchanged if its version is the same or, where a version is unknown, its path or URL.
    """
    index_array = pc.fill_null(pc.index_in(rows["image_id"], value_set=old["image_id"].combine_chunks()), -1)
    indices: npt.NDArray[np.int64] = index_array.to_numpy().astype(np.int64)
    found = np.flatnonzero(indices >= 0)
    new, old = rows.take(found), old.take(indices[found])
    same = pc.coalesce(pc.equal(new["version"], old["version"]), pc.equal(new["uri"], old["uri"])).to_numpy()
    indices[found[~same]] = -1
    return indices


def replace_columns(old: pa.Table, rows: pa.Table) -> pa.Table:
    """Replaces each column of `old` that `rows` also has."""
    for position, name in enumerate(old.schema.names):
        if name in rows.schema.names:
            old = old.set_column(position, old.schema.field(name), rows[name])
    return old


def _to_batch(table: pa.Table) -> pa.RecordBatch:
    return pa.RecordBatch.from_struct_array(table.to_struct_array().combine_chunks())
