"""Stages the rows of a manifest (one row per image) in a local Parquet file.

The rows are counted, hashed and checked before the manifest is written.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captionlib.data.row_buffer import RowBuffer
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.sources.rows import ImageRecord
from captionlib.errors import DatasetError, DuplicateIdError
from captionlib.storage.folders import scratch_folder

__all__ = [
    "StagedRows",
    "check_ids_differ",
    "check_unique_ids",
    "open_database",
    "read_manifest",
    "read_shards",
    "stage_rows",
]

_BATCH_ROWS = 4096
_MAX_SPLITS = 1000
_SCHEMA = MANIFEST_SCHEMA.append(pa.field("origin", pa.string(), nullable=False))  # the origin is a file and line

# Each pass over the file compares about this many ids, so that memory does not grow with the number of rows.
_IDS_PER_PASS = 250_000


@dataclass(frozen=True)
class StagedRows:
    """Rows in a local Parquet file, with the columns of a manifest and their origin.

    If the rows equal those of the existing manifest, in the same order, they are `unchanged` and the file is empty.
    """

    path: Path
    rows: int
    captions: int
    splits: dict[str, int]  # number of rows by split
    digest: str  # hash of all ids in order, which becomes the id of a new manifest
    unchanged: bool


def stage_rows(
    rows: Iterable[ImageRecord],
    path: Path,
    existing: ShardedDataset | None = None,
    report_staged: Callable[[int], None] = lambda rows: None,
) -> StagedRows:
    """Writes rows to a Parquet file at `path`. Writes nothing if they equal those of a complete `existing` manifest.

    Raises:
        DatasetError: there are more than 1000 splits, so the split column must be wrong.
    """
    rows = iter(rows)
    digest = hashlib.blake2b(digest_size=16)
    splits: Counter[str] = Counter()
    captions = 0
    # Rows of the manifest that have not been compared yet. None if there is no manifest, or once a row has differed.
    expected = None if existing is None else RowBuffer(part for _, part in read_manifest(existing))
    options = {"compression": "lz4", "use_dictionary": ["split"], "write_statistics": False}
    with pq.ParquetWriter(path, _SCHEMA, **options) as writer:
        while batch := list(itertools.islice(rows, _BATCH_ROWS)):
            record_batch = _to_batch(batch)
            table = pa.Table.from_batches([record_batch])
            if (
                existing is not None
                and expected is not None
                and not table.equals(expected.take_table(len(batch), MANIFEST_SCHEMA))
            ):
                _copy_rows(existing, splits.total(), writer)
                expected = None
            if expected is None:
                _write(writer, record_batch, [row.origin for row in batch])
            splits.update(map(attrgetter("split"), batch))
            if len(splits) > _MAX_SPLITS:
                raise DatasetError(
                    f"{batch[-1].origin}: expected at most {_MAX_SPLITS} different splits up to this row, got "
                    f"{len(splits)}; check the split column"
                )
            captions += len(record_batch["captions"].values)
            for buffer in record_batch["image_id"].buffers()[1:]:  # offsets and text
                digest.update(buffer)
            report_staged(len(batch))
        unchanged = expected is not None and not expected.take_table(1, MANIFEST_SCHEMA).num_rows
        if existing is not None and expected is not None and not unchanged:
            _copy_rows(existing, splits.total(), writer)
    return StagedRows(path, splits.total(), captions, dict(splits), digest.hexdigest(), unchanged)


def _write(writer: pq.ParquetWriter, rows: pa.RecordBatch, origins: list[str]) -> None:
    writer.write_batch(rows.append_column(_SCHEMA.field("origin"), pa.array(origins, pa.string())))


def _copy_rows(manifest: ShardedDataset, count: int, writer: pq.ParquetWriter) -> None:
    """Writes the first `count` rows of the existing manifest, which equal the first new rows. Their origin is empty."""
    for rows in RowBuffer(batch for _, batch in read_manifest(manifest)).take(count):
        _write(writer, rows, [""] * rows.num_rows)


def _to_batch(rows: list[ImageRecord]) -> pa.RecordBatch:
    columns = [pa.array(list(map(attrgetter(field.name), rows)), field.type) for field in MANIFEST_SCHEMA]
    return pa.RecordBatch.from_arrays(columns, schema=MANIFEST_SCHEMA)


def read_manifest(
    dataset: ShardedDataset, columns: Sequence[str] = MANIFEST_SCHEMA.names
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields the rows of a manifest in batches, each with the number of its shard."""
    for shard in range(dataset.shards):
        for rows in dataset.read_batches(shard, columns, _BATCH_ROWS):
            yield shard, rows


def open_database(scratch: Path) -> duckdb.DuckDBPyConnection:
    """Opens an in-memory database. Data beyond its memory limit goes to temporary files in the folder `scratch`."""
    temporary = str(scratch / "duckdb")
    return duckdb.connect(config={"memory_limit": "256MB", "threads": 2, "temp_directory": temporary})


def check_unique_ids(staged: StagedRows) -> None:
    """Raises DuplicateIdError if two rows have the same id. The message describes both rows."""
    passes = -(-staged.rows // _IDS_PER_PASS)
    with open_database(staged.path.parent) as connection:
        [(hashes,)] = connection.execute(_COUNT_HASHES, [str(staged.path)]).fetchall()
        if hashes == staged.rows:  # no two rows have the same hash, so no two have the same id
            return
        for remainder in range(passes):
            duplicate = connection.execute(_FIND_DUPLICATE, [str(staged.path), passes, remainder]).fetchone()
            if duplicate is not None:
                image_id, count = duplicate
                rows = connection.execute(_FIND_ROWS, [str(staged.path), image_id]).fetchall()
                first, second = (f"{uri} at {origin}" if origin else uri for uri, origin in rows)
                raise DuplicateIdError(
                    f"expected one row per image id, got {count} with {image_id!r}: {first}, and {second}; remove one, "
                    "or choose a different id column; adjacent rows of one image, with one caption each, are merged"
                )


def check_ids_differ(manifests: Mapping[str, ShardedDataset]) -> None:
    """Raises DuplicateIdError if an image id occurs in two manifests. Their keys are the names of the sources."""
    schema = pa.schema([MANIFEST_SCHEMA.field("image_id")])
    batches = (rows for dataset in manifests.values() for _, rows in read_manifest(dataset, schema.names))
    with scratch_folder() as scratch, open_database(scratch) as connection:
        connection.register("images", pa.RecordBatchReader.from_batches(schema, batches))
        repeated = connection.execute(
            "SELECT image_id FROM images GROUP BY image_id HAVING count(*) > 1 LIMIT 1"
        ).fetchone()
    if repeated is not None:
        found = [f"{uri} of source {name}" for name, each in manifests.items() for uri in _find_uris(each, *repeated)]
        raise DuplicateIdError(
            f"expected one image per id in all sources together, got {repeated[0]!r} for {' and '.join(found)}; change "
            "one of the sources. If two folders contain different images with the same name, use their parent folder "
            "as a single source, so that the ids contain the folder names"
        )


def _find_uris(manifest: ShardedDataset, image_id: str) -> list[str]:
    batches = (rows for _, rows in read_manifest(manifest))
    return [uri for rows in batches for uri in rows.filter(pc.equal(rows["image_id"], image_id))["uri"].to_pylist()]


_COUNT_HASHES = "SELECT count(DISTINCT hash(image_id)) FROM read_parquet(?)"
_FIND_DUPLICATE = """
    SELECT image_id, count(*) FROM read_parquet(?) WHERE hash(image_id) % ? = ?
    GROUP BY image_id HAVING count(*) > 1 ORDER BY image_id LIMIT 1
"""
_FIND_ROWS = """
    SELECT uri, origin FROM read_parquet(?, file_row_number = true) WHERE image_id = ? ORDER BY file_row_number LIMIT 2
"""


def read_shards(staged: StagedRows, size: int) -> Iterator[pa.Table]:
    """Yields tables of `size` manifest rows (fewer in the last). About one table is held in memory."""
    with pq.ParquetFile(staged.path) as file:
        buffer = RowBuffer(
            pa.RecordBatch.from_arrays(batch.columns, schema=MANIFEST_SCHEMA)
            for batch in file.iter_batches(batch_size=min(size, _BATCH_ROWS), columns=MANIFEST_SCHEMA.names)
        )
        while (rows := buffer.take_table(size, MANIFEST_SCHEMA)).num_rows:
            yield rows.combine_chunks()
