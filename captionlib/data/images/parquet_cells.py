"""Single cells of Parquet files, by row number; a row group is read once for all of its rows."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import BinaryIO, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captionlib.data.images.addresses import ImageFile
from captionlib.errors import FetchError

__all__ = ["ParquetCellReader"]

Value = TypeVar("Value")

_KEPT_AT_LEAST = 2  # rows on both sides of a boundary between row groups are asked for in turns
_KEPT_FOOTERS = 64


class ParquetCellReader:
    """Reads cells of Parquet files at any allowed address. Safe to use from many threads.

    Messages quote nothing of the files, not even names of columns.

    Args:
        open_file: opens a file at an address.
        max_bytes: column chunks that are larger are refused, and the kept ones are together about as large.
        timeout_seconds: how long a thread waits for what another one is reading already.
    """

    def __init__(self, open_file: Callable[[ImageFile], BinaryIO], max_bytes: int, timeout_seconds: float) -> None:
        self._open_file = open_file
        self._max_bytes = max_bytes
        self._footers: _Kept[pq.FileMetaData] = _Kept(lambda footers: len(footers) > _KEPT_FOOTERS, timeout_seconds)
        self._chunks: _Kept[pa.ChunkedArray] = _Kept(self._is_too_much, timeout_seconds)

    def read_cell(self, file: ImageFile, row: int, column: str, max_bytes: int) -> bytes:
        """The bytes in one cell.

        Args:
            file: the Parquet file.
            row: counted over the whole file, from 0.
            column: its name; of a field of a struct column, both names with a dot between them.
            max_bytes: of the cell.

        Raises:
            FetchError: there is no such row or column, no bytes in it, or too many.
        """
        footer = self._footers.get(file, lambda: self._read_footer(file))
        ends = np.cumsum([footer.row_group(group).num_rows for group in range(footer.num_row_groups)])
        if row >= footer.num_rows:
            raise FetchError("NoSuchRow", f"expected row {row}, got a file of {footer.num_rows} rows")
        group = int(np.searchsorted(ends, row, side="right"))
        chunk = self._chunks.get((file, group, column), lambda: self._read_chunk(file, footer, group, column))
        cell = chunk[row - int(ends[group]) + footer.row_group(group).num_rows]
        content = cell.as_buffer()
        if content is None:
            raise FetchError("NoBytes", f"column {column} is null in row {row}")
        if content.size > max_bytes:
            raise FetchError("TooLarge", f"expected at most {max_bytes} bytes, got {content.size}")
        return bytes(content)

    def _read_chunk(self, file: ImageFile, footer: pq.FileMetaData, group: int, column: str) -> pa.ChunkedArray:
        metadata = footer.row_group(group)
        columns = {metadata.column(index).path_in_schema: index for index in range(metadata.num_columns)}
        if column not in columns:
            raise FetchError("NoSuchColumn", f"expected column {column}, got a file of {len(columns)} other columns")
        size = metadata.column(columns[column]).total_uncompressed_size
        if size > self._max_bytes:
            raise FetchError("TooLarge", f"row group {group} holds {size} bytes; write the file with smaller ones")
        with _arrow_errors(), self._open_file(file) as opened:
            table = pq.ParquetFile(opened, metadata=footer).read_row_group(group, [column], use_threads=False)
        values = table.column(0)
        while pa.types.is_struct(values.type):
            values = pc.struct_field(values, [0])
        if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
            raise FetchError("NoBytes", f"expected bytes in column {column}, got values of another type")
        return values

    def _read_footer(self, file: ImageFile) -> pq.FileMetaData:
        with _arrow_errors(), self._open_file(file) as opened:
            return pq.read_metadata(opened)

    def _is_too_much(self, chunks: list[pa.ChunkedArray]) -> bool:
        return len(chunks) > _KEPT_AT_LEAST and sum(chunk.nbytes for chunk in chunks) > self._max_bytes


class _Kept(Generic[Value]):
    """The values that were used last; each is made by one thread while the others wait for it."""

    def __init__(self, is_too_much: Callable[[list[Value]], bool], timeout_seconds: float) -> None:
        self._is_too_much = is_too_much
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, Future[Value]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        with self._lock:
            known = self._values.get(key)
            if known is not None:
                self._values.move_to_end(key)
            else:
                making = self._values[key] = Future()
        if known is not None:
            return known.result(self._timeout_seconds)
        try:
            making.set_result(make())
        except BaseException as error:
            with self._lock:
                del self._values[key]  # the next one tries again
            making.set_exception(error)
            raise
        self._forget()
        return making.result()

    def _forget(self) -> None:
        """Lets go of the values that were not used for longest."""
        with self._lock:
            done = [key for key, value in self._values.items() if value.done()]
            while done and self._is_too_much([self._values[key].result() for key in done]):
                del self._values[done.pop(0)]


@contextmanager
def _arrow_errors() -> Iterator[None]:
    """Replaces messages of Arrow, which may quote the file."""
    try:
        yield
    except pa.ArrowException as error:
        raise FetchError(
            type(error).__name__, "expected a Parquet file, got one that is damaged or of another format"
        ) from error
