"""Restricts searches to matching images, and counts the matches by facet.

The facets are the split, the source (captions dataset), the month, and whether an image is a duplicate. Rows with the
same values form a group. The text index contains the group of each row, so one pass over the matches of a query counts
them by every facet.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.splits import add_split_aliases
from captionlib.errors import QueryError

__all__ = ["FacetCounts", "FacetGroup", "FacetGrouper", "Facets", "Filter", "name_sources"]

_GROUP = pa.field("group", pa.int64(), nullable=False)
# If there are more groups, new ones cover a year instead of a month. Tantivy counts at most 65,000 groups in one pass.
_MAX_GROUPS = 20_000


@dataclass(frozen=True)
class Filter:
    """Restricts a search to matching images.

    Attributes:
        where: SQL condition over the columns of a row. It can be slow, so do not accept it from untrusted users.
        split: dataset split of the images, such as `test`; `val` and `dev` are the same split.
        min_log_prob: minimum log-probability of a caption.
        source: name of the captions dataset; see `Index.sources`.
        date: year or month in which the files of the images were last modified, such as `2026` or `2026-03`.
        exclude_duplicates: whether to leave out images that are marked as duplicates of another image.
    """

    where: str | None = None
    split: str | None = None
    min_log_prob: float | None = None
    source: str | None = None
    date: str | None = None
    exclude_duplicates: bool = False

    def to_sql(self) -> tuple[str, list[Any]]:
        """Returns one SQL condition and its parameters. `source` is omitted, because it is not a column."""
        splits = None if self.split is None else sorted(add_split_aliases([self.split]))
        parameters = {
            "list_contains(?, split)": splits,
            "log_prob >= ?": self.min_log_prob,
            "starts_with(strftime(modified, '%Y-%m'), ?)": self.date,
        }
        set_parameters = {sql: value for sql, value in parameters.items() if value is not None}
        where = [f"(\n{self.where}\n)"] if self.where is not None else []
        not_duplicate = ["duplicate_of IS NULL"] if self.exclude_duplicates else []
        return " AND ".join([*where, *not_duplicate, *set_parameters]) or "true", list(set_parameters.values())


@dataclass(frozen=True)
class FacetGroup:
    """Rows that have the same value in every facet."""

    split: str
    dataset: int  # position of the captions dataset among the datasets of the index
    month: str  # in which the files were last modified, such as `2026-03`, or a year; empty if it is unknown
    is_duplicate: bool  # whether the images are marked as duplicates of other images
    rows: int  # number of rows


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


@dataclass(frozen=True)
class FacetCounts:
    """Numbers of images by the values of each facet. The counts of a facet ignore the filter's condition on it.

    The keys of `months` are such as `2026-03`. If the index has very many groups of facet values, some are years.
    Images without a known date are not counted in `months`.
    """

    total: int  # number of images that match all conditions
    splits: dict[str, int]
    sources: dict[str, int]
    months: dict[str, int]
    non_duplicates: int  # images that are not marked as duplicates of another image
    duplicates: int


class Facets:
    """The facets of one version of an index. Rows in the same group have the same value of every facet."""

    def __init__(self, groups: Sequence[FacetGroup], sources: Sequence[str]) -> None:
        self.sources = sources
        self._groups = groups
        self._rows = np.array([group.rows for group in groups], np.int64)
        self._undivided_years = {group.month for group in groups if len(group.month) == len("2026")}

    def __len__(self) -> int:
        return len(self._groups)

    def supports_date(self, where: Filter) -> bool:
        """Whether the groups can be selected by the date of a filter: no group covers more than its month."""
        date = where.date or ""
        return date in self._undivided_years or date[: len("2026")] not in self._undivided_years

    def select(self, where: Filter) -> list[int] | None:
        """Returns the numbers of the groups that match the facets of a filter, or None if all groups match."""
        tests = self._make_tests(where)
        selected = [number for number, group in enumerate(self._groups) if all(test(group) for test in tests.values())]
        return None if len(selected) == len(self._groups) else selected

    def count(self, where: Filter, rows: npt.NDArray[np.int64] | None = None) -> FacetCounts:
        """Counts images by facet. `rows` is the number of images in each group, `[groups]`; None for all images."""
        tests = self._make_tests(where)
        total, non_duplicates, duplicates = 0, 0, 0
        splits, sources, months = Counter[str](), Counter[str](), Counter[str]()
        for group, count in zip(self._groups, (self._rows if rows is None else rows).tolist(), strict=True):
            failed = [facet for facet, test in tests.items() if not test(group)]
            total += 0 if failed else count
            splits[group.split] += count if failed in ([], ["split"]) else 0
            sources[self.sources[group.dataset]] += count if failed in ([], ["source"]) else 0
            year = group.month[: len("2026")]
            month = year if year in self._undivided_years else group.month
            months[month] += count if failed in ([], ["date"]) else 0
            meets_other_conditions = failed in ([], ["duplicates"])
            non_duplicates += count if meets_other_conditions and not group.is_duplicate else 0
            duplicates += count if meets_other_conditions and group.is_duplicate else 0
        months.pop("", None)
        by_split, by_source, by_month = (dict(sorted(counter.items())) for counter in (splits, sources, months))
        return FacetCounts(total, by_split, by_source, by_month, non_duplicates, duplicates)

    def _make_tests(self, where: Filter) -> dict[str, Callable[[FacetGroup], bool]]:
        tests: dict[str, Callable[[FacetGroup], bool]] = {}
        if where.split is not None:
            splits = add_split_aliases([where.split])
            tests["split"] = lambda group: group.split in splits
        if where.source is not None:
            tests["source"] = lambda group: self.sources[group.dataset] == where.source
        if where.date is not None:
            date = where.date
            if not self.supports_date(where):
                raise QueryError(
                    f"date: expected a year, got {date}; this index has too many sources and splits to count the "
                    f"images of each month; use {date[:4]}"
                )
            tests["date"] = lambda group: group.month.startswith(date)
        if where.exclude_duplicates:
            tests["duplicates"] = lambda group: not group.is_duplicate
        return tests


def name_sources(folders: Sequence[str]) -> list[str]:
    """Returns the shortest distinct parts of paths: `a` and `b` for `/data/a/captions` and `/data/b/captions`."""
    parts = [folder.rstrip("/").split("/") for folder in folders]
    while len(parts) > 1 and all(len(each) > 1 for each in parts) and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    longest = max(map(len, parts), default=0)
    for length in range(1, longest + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(folders)
