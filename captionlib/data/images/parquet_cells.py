"""Reads images that are stored in Parquet files. The images of a row group are read together and cached."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from cachetools import LRUCache, cached

from captionlib.data.images.addresses import ImageFile
from captionlib.errors import FetchError

__all__ = ["ParquetCellReader"]

_CACHED_FOOTERS = 64


class ParquetCellReader:
    """Reads cells of Parquet files with caching. Thread-safe.

    Error messages do not quote the content of a file, not even column names.

    Args:
        open_file: function that opens a file.
        cache_bytes: size of the cache of column chunks (a column of a row group). Larger chunks are rejected.
    """

    def __init__(self, open_file: Callable[[ImageFile], BinaryIO], cache_bytes: int) -> None:
        self._open_file = open_file
        self._cache_bytes = cache_bytes
        # The conditions make threads wait while another thread reads the same value.
        footers: LRUCache[object, pq.FileMetaData] = LRUCache(_CACHED_FOOTERS)
        self._get_footer = cached(footers, condition=Condition())(self._read_footer)
        # At a row group boundary, concurrent reads alternate between two chunks. To keep both in the cache, a chunk
        # counts as at most half of the cache, even if it is larger.
        half = cache_bytes // 2
        chunks: LRUCache[object, pa.ChunkedArray] = LRUCache(cache_bytes, lambda chunk: min(chunk.nbytes, half))
        self._get_chunk = cached(chunks, condition=Condition())(self._read_chunk)

    def read_cell(self, file: ImageFile, row: int, column: str, max_bytes: int) -> bytes:
        """Reads the bytes of a cell. `row` counts from 0 over the whole file. `column` may be nested: `image.bytes`.

        Raises:
            FetchError: the row or column does not exist, the cell holds no bytes, or it exceeds `max_bytes`.
        """
        footer = self._get_footer(file)
        if row >= footer.num_rows:
            raise FetchError("NoSuchRow", f"expected row {row}, got a file with {footer.num_rows} rows")
        starts = np.cumsum([0, *(footer.row_group(group).num_rows for group in range(footer.num_row_groups))])
        group = int(np.searchsorted(starts, row, side="right")) - 1
        content = self._get_chunk(file, group, column)[row - int(starts[group])].as_buffer()
        if content is None:
            raise FetchError("NoBytes", f"expected bytes in column {column}, row {row}, got null")
        if content.size > max_bytes:
            raise FetchError("TooLarge", f"expected at most {max_bytes} bytes, got {content.size}")
        return bytes(content)

    def _read_footer(self, file: ImageFile) -> pq.FileMetaData:
        with _convert_arrow_errors(), self._open_file(file) as opened:
            return pq.read_metadata(opened)

    def _read_chunk(self, file: ImageFile, group: int, column: str) -> pa.ChunkedArray:
        footer = self._get_footer(file)
        metadata = footer.row_group(group)
        columns = {metadata.column(index).path_in_schema: index for index in range(metadata.num_columns)}
        if column not in columns:
            raise FetchError("NoSuchColumn", f"expected column {column}, got a file with {len(columns)} other columns")
        size = metadata.column(columns[column]).total_uncompressed_size
        if size > self._cache_bytes:
            raise FetchError("TooLarge", f"a column chunk has {size} bytes; write the file with smaller row groups")
        with _convert_arrow_errors(), self._open_file(file) as opened:
            table = pq.ParquetFile(opened, metadata=footer).read_row_group(group, [column], use_threads=False)
        values = table.column(0)
        while pa.types.is_struct(values.type):
            values = pc.struct_field(values, [0])
        if values.type not in (pa.binary(), pa.large_binary(), pa.binary_view()):
            raise FetchError("NoBytes", f"expected bytes in column {column}, got values of a different type")
        return values


@contextmanager
def _convert_arrow_errors() -> Iterator[None]:
    """Converts Arrow exceptions, whose messages may quote the file, to FetchErrors."""
    try:
        yield
    except pa.ArrowException as error:
        raise FetchError("DamagedFile", "expected a Parquet file, got a damaged file or a different format") from error
