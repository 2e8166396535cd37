"""Reads tables of images: CSV, TSV, JSON Lines and Parquet, row by row."""

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.sources.columns import Columns, choose_columns, to_captions, to_text
from captionlib.data.sources.locations import (
    Location,
    find_files,
    find_image_root,
    get_text_extension,
    read_lines,
    resolve_uri,
)
from captionlib.data.sources.rows import ManifestRow, ReportSkip, SourceOptions
from captionlib.errors import DatasetError

__all__ = ["TABLE_EXTENSIONS", "open_parquet", "read_parquet_columns", "read_tables"]

TABLE_EXTENSIONS = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"})

Cells = tuple[int, object, object, Sequence[object], object]
"""The number of a row and its id, uri, captions and split, as the table has them."""


@dataclass(frozen=True)
class _Format:
    """What a row is called in messages, and how the rows of a table are read."""

    row: str
    read: Callable[[Location, SourceOptions], Iterator[tuple[Columns, Cells]]]


def read_tables(addresses: Sequence[str], options: SourceOptions, report_skip: ReportSkip) -> Iterator[ManifestRow]:
    """The images of tables, in their order; consecutive rows of one image, a caption each, become one row.

    Without an id column the id is the uri, as the table has it. Relative uris are relative to `options.image_root`, or else
    to the table's folder. Nothing is skipped.

    Raises:
        ConfigError: a column is missing.
        DatasetError: a table or a row cannot be read; names its line.
    """
    for location in find_files(addresses, TABLE_EXTENSIONS):
        suffix = get_text_extension(location.name)
        table = _FORMATS.get(suffix, _Format("line", _read_delimited))
        yield from _group(_to_rows(table, location, options))


def _to_rows(table: _Format, location: Location, options: SourceOptions) -> Iterator[tuple[ManifestRow, bool]]:
    """The rows, and whether each may be one of several of its image: it may if it has one caption at the most."""
    root = find_image_root(options.image_root, location)
    for columns, (number, image_id, uri, captions, split) in table.read(location, options):
        origin = f"{location.address}, {table.row} {number}"
        written = to_text(uri, origin, columns.uri)
        row = ManifestRow(
            written if columns.id is None else to_text(image_id, origin, columns.id),
            resolve_uri(written, root) if written else "",
            to_text(split, origin, columns.split or "") or options.default_split,
            to_captions(captions, origin),
            origin,
        )
        yield row, bool(columns.captions) and not any(isinstance(value, list) for value in captions)


def _group(rows: Iterable[tuple[ManifestRow, bool]]) -> Iterator[ManifestRow]:
    """Merges consecutive rows of one image; rows with lists of captions stand alone, so that a duplicate is found."""
    current: ManifestRow | None = None
    captions: list[str] = []
    open_for_more = False
    for row, single in rows:
        if current is not None and open_for_more and single and _same_image(current, row):
            captions.extend(row.captions)
            continue
        if current is not None:
            yield _with_captions(current, captions)
        current, captions, open_for_more = row, list(row.captions), single
    if current is not None:
        yield _with_captions(current, captions)


def _same_image(row: ManifestRow, other: ManifestRow) -> bool:
    if (row.image_id, row.uri) != (other.image_id, other.uri):
        return False
    if row.split != other.split:
        raise DatasetError(
            f"image {row.image_id} is in split {row.split!r} at {row.origin} and in {other.split!r} at {other.origin}; "
            "expected one split an image"
        )
    return True


def _with_captions(row: ManifestRow, captions: Sequence[str]) -> ManifestRow:
    if len(captions) == len(row.captions):
        return row
    return ManifestRow(row.image_id, row.uri, row.split, tuple(captions), row.origin)


def _read_delimited(location: Location, options: SourceOptions) -> Iterator[tuple[Columns, Cells]]:
    lines = read_lines(location)
    first = next(lines, "")
    delimiter = max("\t,;|", key=first.count) if first else ","
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        columns = choose_columns(header, options, f"{location.address}, line 1")
        uri, image_id, split = (_index(header, name) for name in (columns.uri, columns.id, columns.split))
        captions = [header.index(name) for name in columns.captions]
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DatasetError(
                    f"{location.address}, line {reader.line_num}: expected {len(header)} cells, got {len(cells)}; "
                    "a cell that holds the delimiter or a line end must be quoted"
                )
            cells.append("")  # what a column that is absent reads
            yield columns, (reader.line_num, cells[image_id], cells[uri], [cells[at] for at in captions], cells[split])
    except csv.Error as error:
        raise DatasetError(f"{location.address}, line {reader.line_num}: {error}; check its quotes") from error


def _index(header: Sequence[str], name: str | None) -> int:
    return -1 if name is None else header.index(name)


def _read_json_lines(location: Location, options: SourceOptions) -> Iterator[tuple[Columns, Cells]]:
    columns: Columns | None = None
    for number, line in enumerate(read_lines(location), 1):
        if not line.strip():
            continue
        record = _parse_json(line, f"{location.address}, line {number}")
        if columns is None:
            columns = choose_columns(list(record), options, f"{location.address}, line {number}")
        image_id = None if columns.id is None else record.get(columns.id)
        split = None if columns.split is None else record.get(columns.split)
        yield (
            columns,
            (number, image_id, record.get(columns.uri), [record.get(name) for name in columns.captions], split),
        )


def _parse_json(line: str, origin: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{origin}, column {error.colno}: not JSON: {error.msg}; expected one object a line"
        ) from error
    if not isinstance(record, dict):
        raise DatasetError(f"{origin}: expected one JSON object a line, got {line.strip():.80}")
    return record


def _read_parquet(location: Location, options: SourceOptions) -> Iterator[tuple[Columns, Cells]]:
    with location.fs.open(location.path, "rb") as file:
        parquet = open_parquet(file, location)
        columns = choose_columns(parquet.schema_arrow.names, options, location.address)
        for number, record in enumerate(read_parquet_columns(parquet, columns.names, location), 1):
            image_id = None if columns.id is None else record[columns.id]
            split = None if columns.split is None else record[columns.split]
            yield columns, (number, image_id, record[columns.uri], [record[name] for name in columns.captions], split)


def open_parquet(file: BinaryIO, location: Location) -> pq.ParquetFile:
    """Opens a Parquet file; of a row group it later buffers a part of each column alone.

    Raises:
        DatasetError: it is none.
    """
    try:
        return pq.ParquetFile(file, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{location.address} is not Parquet, or is damaged: {error}") from error


def read_parquet_columns(
    parquet: pq.ParquetFile, columns: Sequence[str], location: Location
) -> Iterator[dict[str, Any]]:
    """The rows of some columns, as Python values; a dotted name is a field of a struct.

    Raises:
        DatasetError: the file is damaged.
    """
    if not columns:
        yield from ({} for _ in range(parquet.metadata.num_rows))
        return
    try:
        for batch in parquet.iter_batches(batch_size=4096, columns=list(columns)):
            names = batch.schema.names
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield dict(zip(names, values, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{location.address} is damaged: {error}") from error


_FORMATS = {
    ".jsonl": _Format("line", _read_json_lines),
    ".ndjson": _Format("line", _read_json_lines),
    ".json": _Format("line", _read_json_lines),
    ".parquet": _Format("row", _read_parquet),
}
