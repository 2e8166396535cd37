"""Reads any number of rows at a time from an iterator of record batches."""

from collections.abc import Iterator

import pyarrow as pa

__all__ = ["RowBuffer"]


class RowBuffer:
    """Returns any number of rows at a time from an iterator of batches. Holds one batch in memory."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._rest: pa.RecordBatch | None = None

    def take(self, count: int) -> Iterator[pa.RecordBatch]:
        """Yields the next `count` rows in batches, or fewer rows at the end."""
        while count > 0:
            batch = self._rest if self._rest is not None else next(self._batches, None)
            if batch is None:
                return
            self._rest = batch.slice(count) if batch.num_rows > count else None
            yield batch.slice(0, count)
            count -= min(count, batch.num_rows)

    def take_table(self, count: int, schema: pa.Schema) -> pa.Table:
        """Returns the next `count` rows, or fewer at the end."""
        return pa.Table.from_batches(self.take(count), schema)
