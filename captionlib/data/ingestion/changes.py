"""Compares a source (an input dataset) with its manifest (the sharded table of its images), and updates the manifest.

Only the shards with new, changed or missing rows are written.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import cast

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.images.fetching import ImageFetcher
from captionlib.data.images.loading import hash_content
from captionlib.data.ingestion.staging import StagedRows, read_manifest
from captionlib.data.row_buffer import RowBuffer
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.update import update_shards
from captionlib.data.shards.writer import write_shard
from captionlib.errors import FetchError

__all__ = ["Changes", "Comparison", "update_manifest"]

_BATCH_ROWS = 4096
_THREADS = 16


@dataclass(frozen=True)
class Changes:
    """Numbers of rows of a source, compared with its manifest."""

    new: int
    changed: int
    missing: int  # rows of the manifest that are not in the source
    unchanged: int

    @property
    def any(self) -> bool:
        return bool(self.new or self.changed or self.missing)


class Comparison:
    """The rows that differ between a source and a manifest.

    Args:
        database: empty database that runs the comparison.
        staged: the rows of the source, whose ids are unique.
        dataset: the manifest.
        append: whether to keep rows of the manifest that are not in the source.
    """

    def __init__(
        self, database: duckdb.DuckDBPyConnection, staged: StagedRows, dataset: ShardedDataset, append: bool
    ) -> None:
        self._database = database
        self._staged = staged
        self._dataset = dataset
        self._execute_on_existing(_CREATE_DIFFERENCES, str(staged.path))
        database.execute(_CREATE_CHANGES)
        database.execute(_CREATE_MISSING, [not append])
        database.execute("DROP TABLE differences")

    def count(self) -> Changes:
        count = "SELECT count(*) - count(shard), count(shard), (SELECT count(*) FROM missing) FROM changes"
        [(new, changed, missing)] = self._database.execute(count).fetchall()
        return Changes(new, changed, missing, self._staged.rows - new - changed)

    def verify_content(self, hashed: ShardedDataset, fetcher: ImageFetcher) -> None:
        """Reads the images whose version is unchanged, and marks an image as changed if its content has a new hash.

        The expected hash is the one that an earlier verification appended to the version or, by default, the one in the
        column `content_hash` of `hashed`. Images without a hash, and images that cannot be read, count as unchanged.
        """
        self._execute_on_existing("CREATE TABLE existing AS SELECT image_id, shard, version FROM existing_rows")
        schema = pa.schema([("image_id", pa.string()), ("content_hash", pa.string())])
        with self._register("hashes", schema, _read_hashes(hashed, schema)):
            self._database.execute("CREATE TABLE expected AS FROM hashes WHERE content_hash IS NOT NULL")

        def check(row: tuple[int, int, str, str, str]) -> tuple[int, int, str] | None:
            position, shard, version, uri, expected = row
            try:
                actual = f"{hash_content(fetcher.fetch(uri)):016x}"
            except FetchError:
                return None
            return None if actual == expected else (position, shard, f"{version}~{actual}")

        rows = self._database.cursor().execute(_READ_UNCHANGED, [str(self._staged.path)])
        with ThreadPoolExecutor(_THREADS) as threads:
            while batch := rows.fetchmany(_BATCH_ROWS):
                found = [change for change in threads.map(check, batch) if change is not None]
                if found:
                    self._database.executemany("DELETE FROM changes WHERE position = ?", [[row[0]] for row in found])
                    self._database.executemany("INSERT INTO changes VALUES (?, ?, ?)", found)

    def list_changed_shards(self) -> list[int]:
        return sorted(shard for (shard,) in self._database.execute(_LIST_CHANGED_SHARDS).fetchall())

    def count_missing_by_shard(self) -> dict[int, int]:
        return dict(self._database.execute("SELECT shard, count(*) FROM missing GROUP BY shard").fetchall())

    def read_missing_ids(self, shard: int) -> pa.Array:
        ids = self._database.execute("SELECT image_id FROM missing WHERE shard = ?", [shard]).fetchall()
        return pa.array([image_id for (image_id,) in ids], pa.string())

    def read_changed(self) -> Iterator[tuple[int, pa.Table]]:
        """Yields the changed rows by shard, as pairs of shard number and rows, in ascending order."""
        parts = (part for batch in self._read(_READ_CHANGED) for part in _split_by_shard(batch))
        for shard, group in groupby(parts, key=lambda part: part[0]):
            yield shard, pa.Table.from_batches([rows for _, rows in group])

    def read_new(self) -> Iterator[pa.RecordBatch]:
        """Yields the new rows in the order of the source."""
        yield from map(_to_manifest_rows, self._read(_READ_NEW))

    def _execute_on_existing(self, sql: str, *parameters: str) -> None:
        """Runs an SQL statement that reads the manifest with shard numbers, the table `existing_rows`, once."""
        schema = pa.schema([*MANIFEST_SCHEMA, pa.field("shard", pa.int32())])
        batches = (
            rows.append_column("shard", pa.array(np.full(rows.num_rows, shard, np.int32)))
            for shard, rows in read_manifest(self._dataset)
        )
        with self._register("existing_rows", schema, batches):
            self._database.execute(sql, parameters)

    @contextmanager
    def _register(self, name: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[None]:
        """Registers rows as a table that can be read once. Raises errors of `batches` instead of DuckDB's errors."""
        errors: list[Exception] = []

        def read() -> Iterator[pa.RecordBatch]:
            try:
                yield from batches
            except Exception as error:
                errors.append(error)
                raise

        self._database.register(name, pa.RecordBatchReader.from_batches(schema, read()))
        try:
            yield
        except duckdb.Error:
            if errors:
                raise errors[0] from None
            raise
        finally:
            self._database.unregister(name)

    def _read(self, sql: str) -> pa.RecordBatchReader:
        result = self._database.cursor().sql(sql, params=[str(self._staged.path)])
        return cast(pa.RecordBatchReader, result.to_arrow_reader(_BATCH_ROWS))


def _split_by_shard(batch: pa.RecordBatch) -> Iterator[tuple[int, pa.RecordBatch]]:
    shards = batch["shard"].to_numpy()
    bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(shards)]
    for start, end in pairwise(bounds):
        yield int(shards[start]), _to_manifest_rows(batch.slice(start, end - start))


def _to_manifest_rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([batch[name] for name in MANIFEST_SCHEMA.names], schema=MANIFEST_SCHEMA)


def _read_hashes(dataset: ShardedDataset, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for shard in dataset.list_written_shards():
        yield from (
            rows.select(schema.names).cast(schema) for rows in dataset.read_batches(shard, schema.names, _BATCH_ROWS)
        )


def update_manifest(dataset: ShardedDataset, comparison: Comparison, shard_size: int) -> int:
    """Writes the shards with new, changed or missing rows, and returns the new number of shards. The update is atomic.

    Unchanged rows stay where they are. New rows first fill up the last shard, and then go into new shards.
    """
    # A marker is the file that records that a shard is complete.
    rows = {shard: marker.rows for shard, marker in dataset.require_all_markers().items()}
    changed_shards, missing = comparison.list_changed_shards(), comparison.count_missing_by_shard()
    remaining = {shard: count - missing.get(shard, 0) for shard, count in rows.items()}
    last = max((shard for shard, count in remaining.items() if count), default=0)  # empty shards after it are dropped
    new_count = comparison.count().new
    free_rows = max(0, shard_size - remaining[last])
    fills_last = new_count > 0 and free_rows > 0
    new_shards = -(-max(0, new_count - free_rows) // shard_size)
    shards = last + 1 + new_shards
    changed = comparison.read_changed()
    pending = next(changed, None)
    new = RowBuffer(comparison.read_new())
    with update_shards(dataset, shards) as staged:
        for shard in sorted({*changed_shards, *([last] if fills_last else [])}):
            if shard > last:
                continue
            table = dataset.read(shard)
            if pending is not None and pending[0] == shard:
                table = _replace_rows(table, pending[1])
                pending = next(changed, None)
            if shard in missing:
                missing_ids = comparison.read_missing_ids(shard)
                table = table.filter(pc.invert(pc.is_in(table["image_id"], value_set=missing_ids)))
            if fills_last and shard == last:
                table = pa.concat_tables([table, new.take_table(free_rows, MANIFEST_SCHEMA)])
            _write(staged, shard, table)
        for shard in range(last + 1, shards):
            _write(staged, shard, new.take_table(shard_size, MANIFEST_SCHEMA))
    return shards


def _replace_rows(table: pa.Table, changed: pa.Table) -> pa.Table:
    """Replaces rows by id."""
    positions = pc.index_in(table["image_id"], value_set=changed["image_id"].combine_chunks())
    indices = pc.if_else(
        pc.is_valid(positions),
        pc.add(pc.fill_null(positions, 0).cast(pa.int64()), table.num_rows),
        pa.array(np.arange(table.num_rows)),
    )
    return pa.concat_tables([table.select(MANIFEST_SCHEMA.names), changed]).take(indices)


def _write(staged: ShardedDataset, shard: int, table: pa.Table) -> None:
    with write_shard(staged, shard, table.num_rows) as writer:
        writer.write(table.combine_chunks())


# `verify_content` appends a hash of the content to a version. Comparisons with the source ignore it.
_VERSION_WITHOUT_HASH = "regexp_replace({}, '~[0-9a-f]{{16}}$', '')"
_DIGEST = f"hash(uri, {_VERSION_WITHOUT_HASH.format('version')}, split, captions)"
# `position` is the number of the row in the staged file, or null if the row is missing. `shard` is null for new rows.
_CREATE_DIFFERENCES = f"""
    CREATE TABLE differences AS
    SELECT image_id, position, shard, staged.version, existing.version AS existing_version
    FROM (
        SELECT image_id, file_row_number AS position, version, {_DIGEST} AS digest
        FROM read_parquet(?, file_row_number = true)
    ) AS staged
    FULL JOIN (SELECT image_id, shard, version, {_DIGEST} AS digest FROM existing_rows) AS existing USING (image_id)
    WHERE position IS NULL OR shard IS NULL OR staged.digest != existing.digest
"""
# If only the captions of a row change, its version keeps the appended hash.
_CREATE_CHANGES = f"""
    CREATE TABLE changes AS
    SELECT position, shard, CASE WHEN {_VERSION_WITHOUT_HASH.format("existing_version")} = version
        THEN existing_version ELSE version END AS version
    FROM differences WHERE position IS NOT NULL
"""
_CREATE_MISSING = "CREATE TABLE missing AS SELECT image_id, shard FROM differences WHERE position IS NULL AND ?"
_LIST_CHANGED_SHARDS = "SELECT shard FROM changes WHERE shard IS NOT NULL UNION SELECT shard FROM missing"
_READ_CHANGED = """
    SELECT rows.* REPLACE (changes.version AS version), changes.shard
    FROM read_parquet(?, file_row_number = true) AS rows
    JOIN changes ON changes.position = rows.file_row_number WHERE changes.shard IS NOT NULL
    ORDER BY changes.shard, changes.position
"""
_READ_UNCHANGED = f"""
    SELECT rows.file_row_number, existing.shard, rows.version, rows.uri,
        coalesce(nullif(regexp_extract(existing.version, '~([0-9a-f]{{16}})$', 1), ''), expected.content_hash) AS hash
    FROM read_parquet(?, file_row_number = true) AS rows
    JOIN existing USING (image_id) LEFT JOIN expected USING (image_id)
    WHERE {_VERSION_WITHOUT_HASH.format("existing.version")} = rows.version AND hash IS NOT NULL
"""
_READ_NEW = """
    SELECT rows.* FROM read_parquet(?, file_row_number = true) AS rows
    JOIN changes ON changes.position = rows.file_row_number WHERE changes.shard IS NULL ORDER BY changes.position
"""
