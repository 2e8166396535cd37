"""Groups the rows of an index by the values of all facets: split, dataset, month and whether they are duplicates.

The text index contains the group of each row, so one pass over the matches of a query counts them by every facet.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["FacetGroup", "FacetGrouper"]

_GROUP = pa.field("group", pa.int64(), nullable=False)
# If there are more groups, new ones cover a year instead of a month. Tantivy counts at most 65,000 groups in one pass.
_MAX_GROUPS = 20_000


@dataclass(frozen=True)
class FacetGroup:
    """Rows that have the same value in every facet.

    Attributes:
        split: dataset split of the images.
        dataset: position of the captions dataset among the datasets of the index.
        month: month in which the files of the images were last modified, such as `2026-03`; empty if it is unknown. In
            an index with very many groups, it can be a year.
        is_duplicate: whether the images are marked as duplicates of other images.
        rows: number of rows.
    """

    split: str
    dataset: int
    month: str
    is_duplicate: bool
    rows: int


class FacetGrouper:
    """Numbers the groups of rows in the order of their first rows, and counts their rows."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, int, str, bool], int] = {}
        self._rows: list[int] = []

    @property
    def groups(self) -> tuple[FacetGroup, ...]:
        return tuple(FacetGroup(*values, rows) for values, rows in zip(self._numbers, self._rows, strict=True))

    def add_group_numbers(self, dataset: int, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Appends a column with the group number of each row. The batches have the columns of `ROW_SCHEMA`."""
        for batch in batches:
            months = pc.fill_null(pc.strftime(batch["modified"], "%Y-%m"), "")
            columns = [batch["split"], months, batch["duplicate_of"].is_valid()]
            values = zip(*(column.to_pylist() for column in columns), strict=True)
            numbers = [self._count(split, dataset, month, is_duplicate) for split, month, is_duplicate in values]
            yield batch.append_column(_GROUP, pa.array(numbers, pa.int64()))

    def _count(self, split: str, dataset: int, month: str, is_duplicate: bool) -> int:
        number = self._numbers.get((split, dataset, month, is_duplicate))
        if number is None:
            month = month if len(self._rows) < _MAX_GROUPS else month[:4]
            number = self._numbers.setdefault((split, dataset, month, is_duplicate), len(self._rows))
            if number == len(self._rows):
                self._rows.append(0)
        self._rows[number] += 1
        return number
