"""Writes a shard of a dataset: streams rows to Parquet, collects failures, and publishes the files at the end.

The last file is the marker, a JSON file that records that the shard is complete.
"""

import io
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.markers import (
    Marker,
    ShardProgress,
    compute_checksum,
    compute_checksums,
    data_file,
    encode_progress,
    failures_file,
    format_time,
    part_name,
    progress_file,
    write_marker,
)
from captionlib.data.shards.schemas import FAILURES_SCHEMA, add_missing_columns, failure_row
from captionlib.errors import DatasetError, ImageError, StorageError
from captionlib.storage.folders import Folder

__all__ = ["ShardWriter", "write_shard"]

ROW_GROUP_ROWS = 8192
ROW_GROUP_BYTES = 32 << 20
PROGRESS_SECONDS = 5.0  # interval between updates of the progress of an unfinished shard


class ShardWriter:
    """Collects the rows and failures (unreadable images) of a shard. Created by `write_shard`."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema, folder: Folder, shard: int) -> None:
        self.marker: Marker  # describes the shard; set when the `with` block of `write_shard` ends
        self.rows = 0
        self.failures: list[dict[str, str | None]] = []
        self._writer = writer
        self._schema = schema
        self._buffer: list[pa.RecordBatch] = []
        self._buffered_rows = self._buffered_bytes = 0
        self._folder, self._shard, self._started = folder, shard, format_time(time.time())
        self._report_at = time.monotonic() + PROGRESS_SECONDS
        self._is_reported = False

    def write(self, rows: pa.RecordBatch | pa.Table) -> None:
        """Adds rows. Missing nullable columns are filled with nulls."""
        if isinstance(rows, pa.Table):
            for batch in rows.to_batches():
                self.write(batch)
            return
        rows = add_missing_columns(rows, self._schema)
        self._buffer.append(rows)
        self._buffered_rows += rows.num_rows
        self._buffered_bytes += rows.nbytes
        self.rows += rows.num_rows
        if self._buffered_rows >= ROW_GROUP_ROWS or self._buffered_bytes >= ROW_GROUP_BYTES:
            self.flush()
        if time.monotonic() > self._report_at:
            self._report_progress()

    def write_failure(self, row: Mapping[str, Any], error: ImageError) -> None:
        """Records an image that could not be read. `row` is its input row."""
        self.failures.append(failure_row(row, error))

    def flush(self) -> None:
        if self._buffered_rows:
            self._writer.write_table(pa.Table.from_batches(self._buffer, self._schema))
        self._buffer, self._buffered_rows, self._buffered_bytes = [], 0, 0

    def remove_progress(self) -> None:
        if self._is_reported:
            self._folder.remove_file(progress_file(self._shard))

    def _report_progress(self) -> None:
        started = time.monotonic()
        with suppress(StorageError, OSError):  # the shard does not depend on this file
            self._is_reported = True
            images = self.rows + len(self.failures)
            progress = ShardProgress(self._shard, images, self._started, format_time(time.time()))
            self._folder.write(progress_file(self._shard), encode_progress(progress))
        seconds = time.monotonic() - started
        self._report_at = started + max(PROGRESS_SECONDS, 100 * seconds)  # reports take at most 1% of the time


@contextmanager
def write_shard(
    dataset: ShardedDataset, shard: int, expected: int, input_checksum: str = "", earlier_seconds: float = 0.0
) -> Iterator[ShardWriter]:
    """Yields a writer for a shard. The shard is published when the `with` block ends, unless the block raises.

    If the shard exists, a marker that describes the old and the new version is written before the files are replaced.
    Until the replacement is complete, readers accept files of either version.

    Args:
        dataset: the dataset, which must be marked as incomplete.
        shard: number of the shard.
        expected: number of rows and failures together.
        input_checksum: checksum of the data file of the input shard, if there is one.
        earlier_seconds: time taken to write earlier versions of the shard in other folders. It is included in the
            `total_seconds` of the marker.

    Raises:
        DatasetError: rows and failures do not add up to `expected`.
    """
    started = time.monotonic()
    with dataset.folder.stage(data_file(shard)) as path:
        with _open_parquet(path, dataset, expected) as parquet:
            writer = ShardWriter(parquet, dataset.schema, dataset.folder, shard)
            yield writer
            writer.flush()
        if writer.rows + len(writer.failures) != expected:
            raise DatasetError(
                f"{dataset.folder.uri}, {part_name(shard)}: expected {expected} rows and failures together, "
                f"got {writer.rows} rows and {len(writer.failures)} failures; the shard was not published"
            )
        with path.open("rb") as file:
            checksum, block_checksums = compute_checksums(file)  # of the whole file, and of each of its blocks
        failures = _encode_failures(writer.failures)
        previous = dataset.read_marker_even_if_unfinished(shard)
        seconds = time.monotonic() - started
        earlier_seconds += previous.total_seconds if previous is not None else 0
        writer.marker = Marker(
            shard=shard,
            rows=writer.rows,
            failures=len(writer.failures),
            bytes=path.stat().st_size,
            checksum=checksum,
            seconds=round(seconds, 3),
            fingerprint=dataset.fingerprint,
            input_checksum=input_checksum,
            blocks=block_checksums,
            failures_checksum=compute_checksum(io.BytesIO(failures)) if failures else "",
            reasons=dict(Counter(str(row["error"]) for row in writer.failures).most_common()),
            finished=format_time(time.time()),
            total_seconds=round(earlier_seconds + seconds, 3),
        )
        writer.remove_progress()
        if previous is not None and not _has_same_files(previous, writer.marker):
            write_marker(dataset.folder, replace(writer.marker, previous=previous))
    # The end of the block above has moved the data file into place.
    if failures:
        dataset.folder.write(failures_file(shard), failures)
    else:
        dataset.folder.remove_file(failures_file(shard))  # an earlier version may have had failures
    write_marker(dataset.folder, writer.marker)


def _open_parquet(path: Path, dataset: ShardedDataset, rows: int) -> pq.ParquetWriter:
    parquet = pq.ParquetWriter(
        path,
        dataset.schema,
        compression="zstd",
        use_dictionary=[field.name for field in dataset.schema if pa.types.is_string(field.type)],
        bloom_filter_options={"image_id": {"ndv": max(1, min(rows, ROW_GROUP_ROWS)), "fpp": 0.01}},
    )
    # The footer shows how the file was made. It contains no times, so identical rows give identical files.
    footer = {"kind": dataset.kind, "fingerprint": dataset.fingerprint, "config": dataset.config}
    parquet.add_key_value_metadata({"captionlib": json.dumps(footer, sort_keys=True)})
    return parquet


def _has_same_files(previous: Marker, marker: Marker) -> bool:
    """Returns whether `previous` describes a finished shard with the same files, which stays finished."""
    same = previous.checksum == marker.checksum and previous.failures_checksum == marker.failures_checksum
    return same and previous.previous is None


def _encode_failures(failures: list[dict[str, str | None]]) -> bytes:
    """Returns a Parquet file, or no bytes if there are no failures."""
    content = io.BytesIO()
    if failures:
        pq.write_table(pa.Table.from_pylist(failures, FAILURES_SCHEMA), content, compression="zstd")
    return content.getvalue()
