"""Stores the rows of an index, one per captioned image, in memory-mapped Arrow files and filters them with SQL.

Row numbers identify rows throughout the index. Reading 20 rows takes microseconds. With
Parquet, each of them could require decoding a whole row group.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.shards.schemas import add_missing_columns, captions_schema
from captionlib.errors import DatasetError, QueryError
from captionlib.search.sql.session import SqlLimits, connect, restrict_connection
from captionlib.search.sql.statements import check_condition, check_reads_only, to_query_error

__all__ = [
    "CANDIDATES_SCHEMA",
    "COLUMNS",
    "ROW_SCHEMA",
    "CandidateStore",
    "RowStore",
    "find_repeated_id",
    "number_rows",
    "read_rows",
    "write_rows",
]

COLUMNS = ("image_id", "uri", "split", "caption", "log_prob", "tokens", "image_text_score", "width", "height")
"""The columns of a captions dataset that search results show.

`tokens` is the number of tokens of the caption. The last three columns are null if they are not known.
"""

_CAPTIONS = captions_schema(has_scores=True)
ROW_SCHEMA = pa.schema([_CAPTIONS.field(name) for name in COLUMNS])
CANDIDATES_SCHEMA = pa.schema([_CAPTIONS.field("candidates")])

_ROW = pa.field("row", pa.int64(), nullable=False)
_CANDIDATES_BATCH_ROWS = 512  # reading a row decompresses its batch, and all earlier batches to count their rows
_MAX_SLICED_ROWS = 100  # up to this many rows, slicing each row is much faster than `take`


class RepeatedId(NamedTuple):
    """An image id, and the number of rows that have it."""

    image_id: str
    rows: int


def write_rows(rows_path: Path, candidates_path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes rows and their candidate captions to two Arrow files. The candidates are compressed."""
    compressed = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(rows_path), "wb") as rows_file,
        pa.OSFile(str(candidates_path), "wb") as candidates_file,
        pa.ipc.new_file(rows_file, ROW_SCHEMA) as rows,
        pa.ipc.new_file(candidates_file, CANDIDATES_SCHEMA, options=compressed) as candidates,
    ):
        for batch in batches:
            rows.write_batch(batch.select(COLUMNS))
            candidates.write_table(
                pa.Table.from_batches([batch.select(CANDIDATES_SCHEMA.names)]), max_chunksize=_CANDIDATES_BATCH_ROWS
            )


def read_rows(path: Path) -> Iterator[pa.RecordBatch]:
    """Maps an Arrow file into memory and yields its batches, with all columns of `ROW_SCHEMA`.

    Raises:
        DatasetError: the file is missing or invalid.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        for index in range(reader.num_record_batches):
            yield add_missing_columns(reader.get_batch(index), ROW_SCHEMA)
    except (OSError, pa.ArrowInvalid) as error:
        raise DatasetError(f"{path} cannot be read ({error}); build the index again with --overwrite") from error


def number_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Adds a first column of consecutive row numbers to batches."""
    start = 0
    for batch in batches:
        numbers = pa.array(np.arange(start, start + batch.num_rows), pa.int64())
        schema = pa.schema([_ROW, *batch.schema])
        yield pa.RecordBatch.from_arrays([numbers, *batch.columns], schema=schema)
        start += batch.num_rows


def find_repeated_id(paths: Iterable[Path]) -> RepeatedId | None:
    """Returns an image id that several rows of the files have; None if ids are unique. Spills to disk if needed."""
    ids = pa.schema([ROW_SCHEMA.field("image_id")])
    batches = (batch.select(ids.names) for path in paths for batch in read_rows(path))
    with tempfile.TemporaryDirectory(prefix="captionlib-") as spill, closing(connect(SqlLimits(), spill)) as connection:
        connection.register("images", pa.RecordBatchReader.from_batches(ids, batches))
        found = connection.execute(
            "SELECT image_id, count(*) FROM images GROUP BY image_id HAVING count(*) > 1 LIMIT 1"
        ).fetchone()
    return None if found is None else RepeatedId(*found)


class RowStore:
    """The rows of an index. `paths` are the Arrow files of its shards, in order. This class is thread-safe."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._batches = [batch for path in paths for batch in read_rows(path) if batch.num_rows]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._filter: _RowFilter | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: npt.NDArray[np.int64]) -> pa.Table:
        """Returns the rows with the given numbers, in the given order."""
        if not len(rows):
            return ROW_SCHEMA.empty_table()
        batch_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        if len(rows) <= _MAX_SLICED_ROWS:
            offsets = zip(batch_of_row.tolist(), (rows - self._starts[batch_of_row]).tolist(), strict=True)
            slices = [self._batches[index].slice(offset, 1) for index, offset in offsets]
            return pa.Table.from_batches(slices).combine_chunks()
        chunks, order = [], []
        for index in np.unique(batch_of_row):
            positions = np.flatnonzero(batch_of_row == index)
            chunks.append(self._batches[index].take(pa.array(rows[positions] - self._starts[index])))
            order.append(positions)
        restored = np.argsort(np.concatenate(order))
        return pa.Table.from_batches([pa.concat_batches(chunks).take(pa.array(restored))])

    def sample(self, count: int) -> npt.NDArray[np.int64]:
        """Returns the numbers of up to `count` evenly spaced rows."""
        if not len(self):
            return np.empty(0, np.int64)
        return np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))

    def count_splits(self) -> dict[str, int]:
        """Returns the number of images in each split, sorted by split name."""
        counts = Counter[str]()
        for batch in self._batches:
            counts.update({each["values"]: each["counts"] for each in pc.value_counts(batch["split"]).to_pylist()})
        return dict(sorted(counts.items()))

    def list_uris(self) -> Iterator[str]:
        """Yields the URIs of all images."""
        for batch in self._batches:
            yield from batch["uri"].to_pylist()

    def find_matching(self, where: str, parameters: Sequence[Any] = ()) -> npt.NDArray[np.int64]:
        """Returns the row numbers, ascending, of the rows that match a SQL condition over `COLUMNS`.

        Raises:
            QueryError: the condition is invalid or fails.
        """
        if self._filter is None:
            self._filter = _RowFilter(pa.Table.from_batches(number_rows(self._batches), pa.schema([_ROW, *ROW_SCHEMA])))
        return self._filter.find_matching(where, parameters)


class CandidateStore:
    """The candidate captions of all rows of an index. This class is thread-safe.

    All files are mapped into memory at the start, so they stay readable after a build removes them. A file is
    compared with its checksum when it is first read.

    Args:
        paths: the files, whose names are the first characters of their checksums.
        first_rows: the row number of the first row of each file.
    """

    def __init__(self, paths: Sequence[Path], first_rows: Sequence[int]) -> None:
        self._paths = paths
        self._first_rows = np.array(first_rows, np.int64)
        self._files = [pa.memory_map(str(path)).read_buffer() for path in paths]
        self._checked: set[int] = set()

    def read(self, row: int) -> list[dict[str, Any]]:
        """Returns the candidate captions of a row, best first.

        Raises:
            DatasetError: the file is damaged.
        """
        index = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        path, file = self._paths[index], self._files[index]
        if index not in self._checked and not hashlib.sha256(file).hexdigest().startswith(path.stem):
            raise DatasetError(
                f"{path} is damaged: its content does not match its checksum; build the index again with --overwrite"
            )
        self._checked.add(index)
        position = row - int(self._first_rows[index])
        reader = pa.ipc.open_file(file)
        for batch_index in range(reader.num_record_batches):
            batch = reader.get_batch(batch_index)
            if position < batch.num_rows:
                candidates: list[dict[str, Any]] = batch["candidates"][position].as_py()
                return candidates
            position -= batch.num_rows
        raise IndexError(row)


class _RowFilter:
    """Evaluates SQL conditions over numbered rows in DuckDB, without access to files. This class is thread-safe."""

    def __init__(self, rows: pa.Table) -> None:
        self._spill = tempfile.TemporaryDirectory(prefix="captionlib-")
        self._connection = connect(SqlLimits(), self._spill.name)
        restrict_connection(self._connection, [])
        self._rows = rows

    def find_matching(self, where: str, parameters: Sequence[Any]) -> npt.NDArray[np.int64]:
        # The condition is on its own line, so that a comment at its end does not hide the closing parenthesis.
        sql = f"SELECT row FROM captions WHERE (\n{where}\n) ORDER BY row"
        try:
            cursor = self._connection.cursor()
            cursor.register("captions", self._rows)  # a registered view exists only in its cursor
            check_condition(cursor, where)
            check_reads_only(cursor, sql)
            rows = cursor.execute(sql, list(parameters)).fetchnumpy()["row"]
        except (duckdb.Error, QueryError) as error:
            query_error = error if isinstance(error, QueryError) else to_query_error(error)
            message = str(query_error).removeprefix("query: ")  # the prefix of all messages of `to_query_error`
            raise QueryError(
                f"where: {message} Expected a condition over {', '.join(COLUMNS)}, "
                "such as: split = 'val' AND log_prob > -10"
            ) from error
        return np.ascontiguousarray(np.ma.getdata(rows), np.int64)
