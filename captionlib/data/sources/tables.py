"""Reads tables of images (CSV, TSV, JSON Lines and Parquet) row by row."""

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.sources.columns import Columns, select_columns, to_captions, to_text
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


class _Record(NamedTuple):
    """The values of a table row, not yet converted. `number` is its line or row number from 1."""

    number: int
    image_id: object
    uri: object
    captions: Sequence[object]
    split: object


@dataclass(frozen=True)
class _TableFormat:
    """How to read the records of a table, and what error messages call one: a line or a row."""

    unit: str
    read: Callable[[Location, SourceOptions], Iterator[tuple[Columns, _Record]]]


def read_tables(addresses: Sequence[str], options: SourceOptions, report_skip: ReportSkip) -> Iterator[ManifestRow]:
    """Yields the images of tables in their order. Consecutive rows of one image with a caption each become one row.

    Without an id column, the id is the uri as the table spells it. Relative uris start from `options.image_root`, or
    else from the table's folder.

    Raises:
        ConfigError: a column is missing.
        DatasetError: a table or a row cannot be read; names its line.
    """
    for location in find_files(addresses, TABLE_EXTENSIONS):
        table_format = _FORMATS.get(get_text_extension(location.name), _DELIMITED)
        yield from _merge_captions(_to_rows(table_format, location, options))


def _to_rows(
    table_format: _TableFormat, location: Location, options: SourceOptions
) -> Iterator[tuple[ManifestRow, bool]]:
    """Yields each row and whether it may merge with adjacent rows of its image. Rows with lists of captions may not."""
    root = find_image_root(options.image_root, location)
    for columns, record in table_format.read(location, options):
        origin = f"{location.address}, {table_format.unit} {record.number}"
        uri = to_text(record.uri, origin, columns.uri)
        row = ManifestRow(
            uri if columns.id is None else to_text(record.image_id, origin, columns.id),
            resolve_uri(uri, root) if uri else "",
            to_text(record.split, origin, columns.split or "") or options.default_split,
            to_captions(record.captions, origin),
            origin,
        )
        yield row, bool(columns.captions) and not any(isinstance(value, list) for value in record.captions)


def _merge_captions(rows: Iterable[tuple[ManifestRow, bool]]) -> Iterator[ManifestRow]:
    """Merges adjacent mergeable rows of one image. Other rows stay separate, so that duplicate ids are detected."""
    for _, group in itertools.groupby(rows, key=_get_merge_key):
        first, *others = (row for row, _ in group)
        for row in others:
            if row.split != first.split:
                raise DatasetError(
                    f"image {first.image_id} is in split {first.split!r} at {first.origin} and in {row.split!r} at "
                    f"{row.origin}; expected one split per image"
                )
        captions = itertools.chain(first.captions, *(row.captions for row in others))
        yield replace(first, captions=tuple(captions)) if others else first


def _get_merge_key(item: tuple[ManifestRow, bool]) -> object:
    row, mergeable = item
    return (row.image_id, row.uri) if mergeable else object()  # an object differs from all other keys


def _read_delimited(location: Location, options: SourceOptions) -> Iterator[tuple[Columns, _Record]]:
    lines = read_lines(location)
    first = next(lines, "")
    delimiter = max("\t,;|", key=first.count) if first else ","
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        columns = select_columns(header, options, f"{location.address}, line 1")
        uri, image_id, split = (_index(header, name) for name in (columns.uri, columns.id, columns.split))
        captions = [header.index(name) for name in columns.captions]
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DatasetError(
                    f"{location.address}, line {reader.line_num}: expected {len(header)} cells, got {len(cells)}; "
                    "quote cells that contain the delimiter or a line break"
                )
            cells.append("")  # the value of an absent column, at index -1
            values = [cells[index] for index in captions]
            yield columns, _Record(reader.line_num, cells[image_id], cells[uri], values, cells[split])
    except csv.Error as error:
        raise DatasetError(f"{location.address}, line {reader.line_num}: {error}; check its quotes") from error


def _index(header: Sequence[str], name: str | None) -> int:
    return -1 if name is None else header.index(name)


def _read_json_lines(location: Location, options: SourceOptions) -> Iterator[tuple[Columns, _Record]]:
    columns: Columns | None = None
    for number, line in enumerate(read_lines(location), 1):
        if not line.strip():
            continue
        values = _parse_object(line, f"{location.address}, line {number}")
        if columns is None:
            columns = select_columns(list(values), options, f"{location.address}, line {number}")
        yield columns, _to_record(number, values, columns)


def _parse_object(line: str, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{origin}, column {error.colno}: not JSON: {error.msg}; expected one object per line"
        ) from error
    if not isinstance(value, dict):
        raise DatasetError(f"{origin}: expected one JSON object per line, got {line.strip():.80}")
    return value


def _read_parquet(location: Location, options: SourceOptions) -> Iterator[tuple[Columns, _Record]]:
    with location.fs.open(location.path, "rb") as file:
        parquet = open_parquet(file, location)
        columns = select_columns(parquet.schema_arrow.names, options, location.address)
        for number, values in enumerate(read_parquet_columns(parquet, columns.names, location), 1):
            yield columns, _to_record(number, values, columns)


def _to_record(number: int, values: dict[str, Any], columns: Columns) -> _Record:
    image_id = None if columns.id is None else values.get(columns.id)
    split = None if columns.split is None else values.get(columns.split)
    return _Record(number, image_id, values.get(columns.uri), [values.get(name) for name in columns.captions], split)


def open_parquet(file: BinaryIO, location: Location) -> pq.ParquetFile:
    """Opens a Parquet file so that reading buffers a part of each column chunk rather than whole row groups.

    Raises:
        DatasetError: the file is not Parquet.
    """
    try:
        return pq.ParquetFile(file, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{location.address} is not Parquet, or is damaged: {error}") from error


def read_parquet_columns(
    parquet: pq.ParquetFile, columns: Sequence[str], location: Location
) -> Iterator[dict[str, Any]]:
    """Yields the rows as Python values by column. A dotted name selects a field of a struct.

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


_DELIMITED = _TableFormat("line", _read_delimited)
_JSON_LINES = _TableFormat("line", _read_json_lines)
_FORMATS = {
    ".jsonl": _JSON_LINES,
    ".ndjson": _JSON_LINES,
    ".json": _JSON_LINES,
    ".parquet": _TableFormat("row", _read_parquet),
}
