"""Stores the rows of an index, one per captioned image, in memory-mapped Arrow files, and filters them with SQL.

Reading 20 rows takes microseconds. With Parquet, each row could require decoding a whole row group.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.row_buffer import RowBuffer
from captionlib.data.shards.schemas import FAILURES_SCHEMA, add_missing_columns, captions_schema
from captionlib.errors import DatasetError, QueryError
from captionlib.search.index_folder import damage_error
from captionlib.search.sql.session import SqlLimits, connect, restrict_connection
from captionlib.search.sql.statements import check_condition, check_reads_only, to_query_error

__all__ = [
    "DETAILS_BATCH_ROWS",
    "DETAILS_SCHEMA",
    "INDEX_FAILURES_SCHEMA",
    "RESULT_COLUMNS",
    "ROW_SCHEMA",
    "DetailStore",
    "FailureStore",
    "RowStore",
    "find_repeated_id",
    "number_rows",
    "read_rows",
    "write_details",
    "write_failures",
    "write_rows",
]

RESULT_COLUMNS = ("image_id", "uri", "split", "caption", "log_prob", "tokens", "image_text_score", "width", "height")
"""The columns of search results. `tokens` is the number of tokens. The last three are null if they are unknown."""

_CAPTIONS = captions_schema(has_scores=True)
ROW_SCHEMA = pa.schema(
    [
        *(_CAPTIONS.field(name) for name in (*RESULT_COLUMNS, "version")),
        pa.field("modified", pa.timestamp("s")),
        pa.field("duplicate_of", pa.string()),
    ]
)
"""The columns of a row.

`version` changes when the file of the image does. `modified` is the time, in UTC, of the last change of the file; null
if it is unknown. `duplicate_of` is the id of the image that is kept instead of a duplicate; null for other images.
"""

_REFERENCES = pa.field("references", pa.list_(pa.string()))
_ATTENTION = pa.field("attention", pa.list_(pa.list_(pa.float16())))
DETAILS_SCHEMA = pa.schema([_CAPTIONS.field("candidates"), _REFERENCES, _ATTENTION])
"""The columns that only the web page of an image shows. References and attention are null if they are not known."""

INDEX_FAILURES_SCHEMA = pa.schema([FAILURES_SCHEMA.field(name) for name in ("image_id", "stage", "error")])
"""The columns of an image without a caption. Without messages, which can contain private paths or URLs."""

_ROW = pa.field("row", pa.int64(), nullable=False)
_SOURCE = pa.field("source", pa.string(), nullable=False)
DETAILS_BATCH_ROWS = 256
"""Number of rows in a batch of details. Reading a row decompresses its batch."""

_MAX_SLICED_ROWS = 100  # up to this many rows, slicing each row is much faster than `take`


def write_rows(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, ROW_SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)


def write_details(path: Path, batches: Iterator[pa.RecordBatch]) -> None:
    """Writes details to a compressed Arrow file, in batches of equal size, so `DetailStore` can find a row."""
    buffer = RowBuffer(batches)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, DETAILS_SCHEMA, options=options) as writer:
        while details := buffer.take_table(DETAILS_BATCH_ROWS, DETAILS_SCHEMA):
            writer.write_table(details.combine_chunks(), max_chunksize=DETAILS_BATCH_ROWS)


def write_failures(path: Path, failures: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, INDEX_FAILURES_SCHEMA) as writer:
        writer.write_table(failures.select(INDEX_FAILURES_SCHEMA.names))


def read_rows(path: Path) -> Iterator[pa.RecordBatch]:
    """Maps an Arrow file into memory and yields its batches, with all columns of `ROW_SCHEMA`."""
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
        yield batch.add_column(0, _ROW, numbers)
        start += batch.num_rows


def find_repeated_id(paths: Iterable[Path]) -> tuple[str, int] | None:
    """Returns an image id that occurs in several rows of the files, and their number. Spills to disk if needed."""
    ids = pa.schema([ROW_SCHEMA.field("image_id")])
    batches = (batch.select(ids.names) for path in paths for batch in read_rows(path))
    with tempfile.TemporaryDirectory(prefix="captionlib-") as spill, closing(connect(SqlLimits(), spill)) as connection:
        connection.register("images", pa.RecordBatchReader.from_batches(ids, batches))
        sql = "SELECT image_id, count(*) FROM images GROUP BY image_id HAVING count(*) > 1 LIMIT 1"
        return cast("tuple[str, int] | None", connection.execute(sql).fetchone())


class RowStore:
    """The rows of an index, from the Arrow files of its shards. This class is thread-safe."""

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

    def list_uris(self) -> Iterator[str]:
        """Yields the URIs of all images."""
        for batch in self._batches:
            yield from batch["uri"].to_pylist()

    def find_matching(self, where: str, parameters: Sequence[Any] = ()) -> npt.NDArray[np.int64]:
        """Returns the numbers of the rows that match a SQL condition over `ROW_SCHEMA` and `row`, the row number."""
        if self._filter is None:
            self._filter = _RowFilter(pa.Table.from_batches(number_rows(self._batches), pa.schema([_ROW, *ROW_SCHEMA])))
        return self._filter.find_matching(where, parameters)


class DetailStore:
    """The details of all rows of an index; see `DETAILS_SCHEMA`. This class is thread-safe.

    The files are mapped into memory, so they stay readable after a build removes them. The name of a file begins with
    its checksum, which is verified when the file is first read. `first_rows` are the numbers of the files' first rows.
    """

    def __init__(self, paths: Sequence[Path], first_rows: Sequence[int]) -> None:
        self._paths = paths
        self._first_rows = np.array(first_rows, np.int64)
        self._files = [pa.memory_map(str(path)).read_buffer() for path in paths]
        self._checked: set[int] = set()

    def read(self, row: int) -> dict[str, Any]:
        """Returns the details of a row."""
        index = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        path, file = self._paths[index], self._files[index]
        if index not in self._checked and not hashlib.sha256(file).hexdigest().startswith(path.stem):
            raise damage_error(str(path))
        self._checked.add(index)
        batch_index, position = divmod(row - int(self._first_rows[index]), DETAILS_BATCH_ROWS)
        details: dict[str, Any] = pa.ipc.open_file(file).get_batch(batch_index).slice(position, 1).to_pylist()[0]
        return details


class FailureStore:
    """The images without a caption, with the reasons. This class is thread-safe.

    `files` contains the path of each file, and the source (name of the captions dataset) of its images.
    """

    def __init__(self, files: Iterable[tuple[Path, str]]) -> None:
        tables = [INDEX_FAILURES_SCHEMA.append(_SOURCE).empty_table()]
        for path, source in files:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            tables.append(table.append_column(_SOURCE, pa.repeat(source, len(table))))
        self._failures = pa.concat_tables(tables)

    def __len__(self) -> int:
        return len(self._failures)

    def count(self, column: str) -> dict[str, int]:
        """Returns the number of images for each value of a column, in descending order."""
        counts = self._failures[column].value_counts().to_pylist()
        return {each["values"]: each["counts"] for each in sorted(counts, key=lambda each: -each["counts"])}

    def find(self, error: str | None = None, source: str | None = None) -> pa.Table:
        """Returns the images that failed with the given error and belong to the given source; None matches all."""
        found = self._failures
        for column, value in (("error", error), ("source", source)):
            if value is not None:
                found = found.filter(pc.equal(found[column], value))
        return found


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
                f"where: {message} Expected a condition over {', '.join(ROW_SCHEMA.names)}, "
                "such as: split = 'val' AND log_prob > -10"
            ) from error
        return np.ascontiguousarray(np.ma.getdata(rows), np.int64)
