"""The rows of an index: what an answer shows and a condition may ask about, in Arrow files that are mapped, not read.

A row's number is its place in the index. Fetching twenty rows takes microseconds, where Parquet would decode twenty row
groups; the n best captions of an image, which no list of answers shows, stay in the Parquet.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.shards.schemas import captions_schema
from captionlib.errors import DatasetError
from captionlib.search.conditions import Conditions

__all__ = ["COLUMNS", "ROWS", "RowStore", "number_rows", "read_rows", "write_rows"]

COLUMNS = ("image_id", "uri", "split", "caption", "log_prob", "tokens")
"""The columns of `captions/` that an index keeps."""

ROWS = pa.schema([pa.field("row", pa.int64(), nullable=False), *(captions_schema().field(name) for name in COLUMNS)])

_BATCH_ROWS = 65_536
_FEW_ROWS = 100  # up to which cutting them out one by one takes a fraction of what gathering does


def number_rows(batches: Iterable[pa.RecordBatch], offset: int) -> Iterator[pa.RecordBatch]:
    """Puts the number of each row before its columns.

    Args:
        batches: with the columns `COLUMNS`.
        offset: the number of the first row.
    """
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
    """The batches of an Arrow file, mapped into memory."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except (OSError, pa.ArrowInvalid) as error:
        raise DatasetError(f"{path} cannot be read ({error}); build the index again") from error
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


class RowStore:
    """The rows of all shards of an index. Safe to use from many threads.

    Args:
        paths: of the files, by rising row numbers.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._numbered = [batch for path in paths for batch in read_rows(path) if batch.num_rows]
        self._starts = np.array([batch["row"][0].as_py() for batch in self._numbered], np.int64)
        self._batches = [batch.select(COLUMNS) for batch in self._numbered]
        self._conditions: Conditions | None = None

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def take(self, rows: npt.NDArray[np.int64]) -> pa.Table:
        """These rows, in this order, without their numbers."""
        if not len(rows):
            return ROWS.empty_table().select(COLUMNS)
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        if len(rows) <= _FEW_ROWS:
            picks = zip(owners.tolist(), (rows - self._starts[owners]).tolist(), strict=True)
            return pa.Table.from_batches(
                [self._batches[owner].slice(place, 1) for owner, place in picks]
            ).combine_chunks()
        pieces, order = [], []
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            pieces.append(self._batches[owner].take(pa.array(rows[places] - self._starts[owner])))
            order.append(places)
        back = np.argsort(np.concatenate(order))
        return pa.Table.from_batches([pa.concat_batches(pieces).take(pa.array(back))])

    def spread(self, count: int) -> npt.NDArray[np.int64]:
        """The numbers of so many rows, or of all if there are fewer, at even distances."""
        if not self._batches:
            return np.empty(0, np.int64)
        places = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))
        firsts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])[:-1]
        owners = np.searchsorted(firsts, places, side="right") - 1
        numbers: npt.NDArray[np.int64] = self._starts[owners] + places - firsts[owners]
        return numbers

    def splits(self) -> list[str]:
        """The splits that there are, sorted."""
        return sorted({split for batch in self._batches for split in pc.unique(batch["split"]).to_pylist()})

    def passing(self, where: str, parameters: Iterable[Any] = ()) -> npt.NDArray[np.int64]:
        """The numbers of the rows that a condition of SQL holds for, rising.

        Raises:
            QueryError: it is no condition over `COLUMNS`.
        """
        if self._conditions is None:
            self._conditions = Conditions(pa.Table.from_batches(self._numbered, ROWS))
        return self._conditions.passing(where, list(parameters))
