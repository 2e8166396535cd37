"""Keeps the rows of a source in a local file until all are known to be good: counted, hashed, and of unique ids."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.sources.rows import ManifestRow
from captionlib.errors import DatasetError, DuplicateIdError

__all__ = ["Staged", "read_slices", "refuse_duplicates", "stage_rows"]

_BATCH_ROWS = 4096
_MAX_SPLITS = 1000
_SCHEMA = MANIFEST_SCHEMA.append(pa.field("origin", pa.string(), nullable=False))

# Ids are compared in passes of about this many, so that memory does not grow with the rows.
_IDS_PER_PASS = 250_000


@dataclass(frozen=True)
class Staged:
    """Rows in a file.

    Attributes:
        path: a Parquet file of the manifest's columns and `origin`.
        rows: how many.
        captions: how many in all rows.
        splits: rows by split.
        content: a hash of the rows in their order.
    """

    path: Path
    rows: int
    captions: int
    splits: dict[str, int]
    content: str


def stage_rows(rows: Iterable[ManifestRow], path: Path) -> Staged:
    """Writes rows to a file.

    Raises:
        DatasetError: a row has no id or no uri, text that is no Unicode, or there are too many splits; names its origin.
    """
    digest = hashlib.sha256()
    splits: Counter[str] = Counter()
    captions = 0
    waiting: list[ManifestRow] = []
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd", use_dictionary=["split"]) as writer:
        for row in rows:
            digest.update(_encode(row))
            splits[row.split] += 1
            if len(splits) > _MAX_SPLITS:
                raise DatasetError(
                    f"{row.origin}: more than {_MAX_SPLITS} different splits, the last is {row.split!r}; "
                    "is it the right column?"
                )
            captions += len(row.captions)
            waiting.append(row)
            if len(waiting) == _BATCH_ROWS:
                writer.write_batch(_to_batch(waiting))
                waiting.clear()
        if waiting:
            writer.write_batch(_to_batch(waiting))
    return Staged(path, splits.total(), captions, dict(splits), digest.hexdigest())


def _encode(row: ManifestRow) -> bytes:
    """A row as bytes that are the same on every machine."""
    if not row.image_id.strip() or not row.uri.strip():
        what = "an image id" if not row.image_id.strip() else "a uri"
        raise DatasetError(f"{row.origin}: expected {what}, got an empty one; fill it, or take the row out")
    try:
        return json.dumps([row.image_id, row.uri, row.split, row.captions], ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"{row.origin}: holds text that is no Unicode ({error.reason}): {error.object!a:.80}"
        ) from error


def _to_batch(rows: list[ManifestRow]) -> pa.RecordBatch:
    columns = (
        [row.image_id for row in rows],
        [row.uri for row in rows],
        [row.split for row in rows],
        [row.captions for row in rows],
        [row.origin for row in rows],
    )
    return pa.RecordBatch.from_arrays(
        [pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA
    )


def refuse_duplicates(staged: Staged) -> None:
    """Checks that ids are unique.

    Raises:
        DuplicateIdError: they are not; names two rows.
    """
    folder = staged.path.parent
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": "256MB",
        "threads": 2,
        "temp_directory": str(folder / "duckdb"),
    }
    passes = -(-staged.rows // _IDS_PER_PASS)
    with duckdb.connect(config=settings) as connection:
        for number in range(passes):
            twice = connection.execute(_FIND_DUPLICATE, [str(staged.path), passes, number]).fetchone()
            if twice is not None:
                both = connection.execute(_FIND_ROWS, [str(staged.path), twice[0]]).fetchall()
                raise DuplicateIdError(_describe_duplicate(*twice, *(_at(uri, origin) for uri, origin in both)))


_FIND_DUPLICATE = """
    SELECT image_id, count(*) FROM read_parquet(?) WHERE hash(image_id) % ? = ?
    GROUP BY image_id HAVING count(*) > 1 ORDER BY image_id LIMIT 1
"""
_FIND_ROWS = """
    SELECT uri, origin FROM read_parquet(?, file_row_number = true) WHERE image_id = ? ORDER BY file_row_number LIMIT 2
"""


def _describe_duplicate(image_id: str, count: int, first: str, second: str) -> str:
    return (
        f"image id {image_id!r} is there {count} times: {first}, and {second}; expected one row an image. Take one "
        "out, or choose another id column; where a row is a caption, the rows of one image must follow each other"
    )


def _at(uri: str, origin: str) -> str:
    return f"{uri} at {origin}" if origin else uri


def read_slices(staged: Staged, size: int) -> Iterator[pa.RecordBatch]:
    """The rows of the manifest in pieces of `size`, the last one smaller; memory holds about a piece."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    with pq.ParquetFile(staged.path) as file:
        for batch in file.iter_batches(batch_size=min(size, _BATCH_ROWS), columns=MANIFEST_SCHEMA.names):
            waiting.append(batch)
            count += batch.num_rows
            while count >= size:
                table = pa.Table.from_batches(waiting)
                yield _one_batch(table.slice(0, size))
                count -= size
                waiting = table.slice(size).to_batches()
    if count:
        yield _one_batch(pa.Table.from_batches(waiting))


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    [batch] = table.combine_chunks().to_batches()
    return pa.RecordBatch.from_arrays(batch.columns, schema=MANIFEST_SCHEMA)
