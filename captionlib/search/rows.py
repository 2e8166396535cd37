"""Stores the rows of an index, one per captioned image, in memory-mapped Arrow files and filters them with SQL.

Row numbers identify rows throughout the index. Reading 20 rows takes microseconds; Parquet would decode 20 row groups.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.shards.schemas import captions_schema
from captionlib.errors import DatasetError, QueryError
from captionlib.search.sql.session import SqlLimits, connect, lock_connection
from captionlib.search.sql.statements import check_reads_only, describe_error

__all__ = ["COLUMNS", "ROWS", "RowStore", "number_rows", "read_rows", "write_rows"]

COLUMNS = ("image_id", "uri", "split", "caption", "log_prob", "tokens")
"""The columns of a captions dataset that an index contains."""

ROWS = pa.schema([pa.field("row", pa.int64(), nullable=False), *(captions_schema().field(name) for name in COLUMNS)])

_BATCH_ROWS = 65_536
_MAX_SLICED_ROWS = 100  # up to this many rows, slicing each row is much faster than `take`


def number_rows(batches: Iterable[pa.RecordBatch], offset: int) -> Iterator[pa.RecordBatch]:
    """Adds a first column of row numbers, starting at `offset`, to batches with the columns `COLUMNS`."""
    for batch in batches:
        numbers = pa.array(np.arange(offset, offset + batch.num_rows), pa.int64())
        yield pa.RecordBatch.from_arrays([numbers, *(batch[name] for name in COLUMNS)], schema=ROWS)
        offset += batch.num_rows


def write_rows(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes numbered rows to an Arrow file."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, ROWS) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_rows(path: Path) -> Iterator[pa.RecordBatch]:
    """Maps an Arrow file into memory and yields its batches.

    Raises:
        DatasetError: the file is missing or invalid.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except (OSError, pa.ArrowInvalid) as error:
        raise DatasetError(f"{path} cannot be read ({error}); build the index again") from error
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


class RowStore:
    """The rows of all shards of an index, in Arrow files ordered by row number. This class is thread-safe."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._numbered = [batch for path in paths for batch in read_rows(path) if batch.num_rows]
        self._starts = np.array([batch["row"][0].as_py() for batch in self._numbered], np.int64)
        self._batches = [batch.select(COLUMNS) for batch in self._numbered]
        self._filter: _RowFilter | None = None

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def take(self, rows: npt.NDArray[np.int64]) -> pa.Table:
        """Returns the rows with the given numbers, in the given order, without the column of row numbers."""
        if not len(rows):
            return ROWS.empty_table().select(COLUMNS)
        batch_numbers = np.searchsorted(self._starts, rows, side="right") - 1  # the batch of each row
        if len(rows) <= _MAX_SLICED_ROWS:
            offsets = zip(batch_numbers.tolist(), (rows - self._starts[batch_numbers]).tolist(), strict=True)
            slices = [self._batches[number].slice(offset, 1) for number, offset in offsets]
            return pa.Table.from_batches(slices).combine_chunks()
        chunks, order = [], []
        for number in np.unique(batch_numbers):
            positions = np.flatnonzero(batch_numbers == number)
            chunks.append(self._batches[number].take(pa.array(rows[positions] - self._starts[number])))
            order.append(positions)
        restored = np.argsort(np.concatenate(order))
        return pa.Table.from_batches([pa.concat_batches(chunks).take(pa.array(restored))])

    def sample(self, count: int) -> npt.NDArray[np.int64]:
        """Returns the numbers of up to `count` evenly spaced rows."""
        if not self._batches:
            return np.empty(0, np.int64)
        positions = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))
        offsets = np.cumsum([0, *(batch.num_rows for batch in self._batches)])[:-1]
        batch_numbers = np.searchsorted(offsets, positions, side="right") - 1
        numbers: npt.NDArray[np.int64] = self._starts[batch_numbers] + positions - offsets[batch_numbers]
        return numbers

    def list_splits(self) -> list[str]:
        """Returns the splits of the images, sorted."""
        return sorted({split for batch in self._batches for split in pc.unique(batch["split"]).to_pylist()})

    def find_matching(self, where: str, parameters: Sequence[Any] = ()) -> npt.NDArray[np.int64]:
        """Returns the numbers of the rows that match a SQL condition over `COLUMNS`, ascending.

        Raises:
            QueryError: the condition is invalid or fails.
        """
        if self._filter is None:
            self._filter = _RowFilter(pa.Table.from_batches(self._numbered, ROWS))
        return self._filter.find_matching(where, parameters)


class _RowFilter:
    """Evaluates SQL conditions over numbered rows in a locked DuckDB connection. This class is thread-safe."""

    def __init__(self, rows: pa.Table) -> None:
        self._spill = tempfile.TemporaryDirectory(prefix="captionlib-")
        self._connection = connect(SqlLimits(), self._spill.name)
        lock_connection(self._connection, [])
        self._rows = rows

    def find_matching(self, where: str, parameters: Sequence[Any]) -> npt.NDArray[np.int64]:
        # The condition is on its own line, so that a comment at its end does not hide the closing parenthesis.
        sql = f"SELECT row FROM captions WHERE (\n{where}\n) ORDER BY row"
        try:
            cursor = self._connection.cursor()
            cursor.register("captions", self._rows)  # a registered view exists only in its cursor
            check_reads_only(cursor, sql)
            rows = cursor.execute(sql, list(parameters)).fetchnumpy()["row"]
        except (duckdb.Error, QueryError) as error:
            query_error = error if isinstance(error, QueryError) else describe_error(error)
            message = str(query_error).removeprefix("query: ")
            raise QueryError(
                f"where: {message} Expected a condition over {', '.join(COLUMNS)}, "
                "such as: split = 'val' AND log_prob > -10"
            ) from error
        return np.ascontiguousarray(np.ma.getdata(rows), np.int64)
