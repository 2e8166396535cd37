"""The rows of an index: the columns that results show and conditions filter, in memory-mapped Arrow files.

Row numbers identify rows throughout the index. Reading twenty rows takes microseconds; Parquet would decode twenty row
groups. The n-best candidates of an image, which no list of results shows, stay in the Parquet files.
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
from captionlib.search.sql.statements import check_reads_only

__all__ = ["COLUMNS", "ROWS", "RowStore", "number_rows", "read_rows", "write_rows"]

COLUMNS = ("image_id", "uri", "split", "caption", "log_prob", "tokens")
"""The columns of `captions/` that an index holds."""

ROWS = pa.schema([pa.field("row", pa.int64(), nullable=False), *(captions_schema().field(name) for name in COLUMNS)])

_BATCH_ROWS = 65_536
_MAX_SLICED_ROWS = 100  # up to this many rows, slicing each is much faster than gathering


def number_rows(batches: Iterable[pa.RecordBatch], offset: int) -> Iterator[pa.RecordBatch]:
    """Adds row numbers from `offset` to batches with the columns `COLUMNS`, as the first column."""
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
        DatasetError: the file is missing or damaged.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except (OSError, pa.ArrowInvalid) as error:
        raise DatasetError(f"{path} cannot be read ({error}); build the index again") from error
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


class RowStore:
    """The rows of all shards of an index, in Arrow files ordered by row number. Thread-safe."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._numbered = [batch for path in paths for batch in read_rows(path) if batch.num_rows]
        self._starts = np.array([batch["row"][0].as_py() for batch in self._numbered], np.int64)
        self._batches = [batch.select(COLUMNS) for batch in self._numbered]
        self._filter: _RowFilter | None = None

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def take(self, rows: npt.NDArray[np.int64]) -> pa.Table:
        """Returns the rows with these numbers, in this order, without their numbers."""
        if not len(rows):
            return ROWS.empty_table().select(COLUMNS)
        owners = np.searchsorted(self._starts, rows, side="right") - 1  # the batch of each row
        if len(rows) <= _MAX_SLICED_ROWS:
            positions = zip(owners.tolist(), (rows - self._starts[owners]).tolist(), strict=True)
            slices = [self._batches[owner].slice(position, 1) for owner, position in positions]
            return pa.Table.from_batches(slices).combine_chunks()
        pieces, order = [], []
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            pieces.append(self._batches[owner].take(pa.array(rows[places] - self._starts[owner])))
            order.append(places)
        restored = np.argsort(np.concatenate(order))
        return pa.Table.from_batches([pa.concat_batches(pieces).take(pa.array(restored))])

    def sample(self, count: int) -> npt.NDArray[np.int64]:
        """Returns the numbers of up to `count` evenly spaced rows."""
        if not self._batches:
            return np.empty(0, np.int64)
        positions = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))
        firsts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])[:-1]
        owners = np.searchsorted(firsts, positions, side="right") - 1
        numbers: npt.NDArray[np.int64] = self._starts[owners] + positions - firsts[owners]
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
    """Evaluates SQL conditions over numbered rows in a locked DuckDB connection. Thread-safe."""

    def __init__(self, rows: pa.Table) -> None:
        self._spill = tempfile.TemporaryDirectory(prefix="captionlib-")
        self._connection = connect(SqlLimits(), self._spill.name)
        lock_connection(self._connection, [])
        self._rows = rows

    def find_matching(self, where: str, parameters: Sequence[Any]) -> npt.NDArray[np.int64]:
        # The condition has its own line, so that a comment at its end hides nothing.
        sql = f"SELECT row FROM captions WHERE (\n{where}\n) ORDER BY row"
        try:
            cursor = self._connection.cursor()
            cursor.register("captions", self._rows)  # a registered view belongs to its cursor
            check_reads_only(cursor, sql)
            rows = cursor.execute(sql, list(parameters)).fetchnumpy()["row"]
        except (duckdb.Error, QueryError) as error:
            message = str(error).removeprefix("query: ")
            raise QueryError(
                f"where: {message}\nExpected a condition over {', '.join(COLUMNS)}, "
                "such as: split = 'val' AND log_prob > -10"
            ) from error
        return np.ascontiguousarray(np.ma.getdata(rows), np.int64)
