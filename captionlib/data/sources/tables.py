"""Reads tables of image paths or URLs with captions: CSV, TSV, text, JSON and Parquet files."""

import csv
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.sources.columns import Columns, select_columns
from captionlib.data.sources.locations import (
    Location,
    find_files,
    find_image_root,
    get_text_extension,
    load_json,
    open_file,
    read_lines,
    resolve_uri,
)
from captionlib.data.sources.rows import ManifestRow, SkipCounter, SourceOptions
from captionlib.data.sources.values import (
    parse_captions,
    parse_cell,
    parse_id,
    parse_json,
    parse_list,
    parse_object,
    parse_optional,
    parse_text,
)
from captionlib.errors import ConfigError, DatasetError

__all__ = [
    "TABLE_EXTENSIONS",
    "open_parquet",
    "parse_caption_columns",
    "parse_split_column",
    "read_parquet_columns",
    "read_tables",
]

TABLE_EXTENSIONS = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"})

_QUOTED_CELL = re.compile(r'\s*"((?:[^"]|"")*)"\s*', re.DOTALL)


class _Record(NamedTuple):
    """A table row before parsing.

    Attributes:
        origin: file and 1-based line or row number, for error messages.
        columns: columns to read.
        values: unparsed values by column.
    """

    origin: str
    columns: Columns
    values: Mapping[str, Any]


def read_tables(addresses: Sequence[str], options: SourceOptions, skips: SkipCounter) -> Iterator[ManifestRow]:
    """Yields the images of tables in file order. Consecutive rows with captions of the same image become one row.

    Without an id column, the id is the uri exactly as it is in the table. Uris may be relative to `options.image_root`
    or, by default, to the table's folder. See `RowReader` for the arguments.

    Raises:
        ConfigError: a column is missing or ambiguous.
        DatasetError: a table or a row cannot be read. The message contains the line number.
    """
    for location in find_files(addresses, TABLE_EXTENSIONS):
        read = _READERS.get(get_text_extension(location.name), _read_delimited)
        if options.columns and read is not _read_delimited:
            raise ConfigError(f"{location.address}: --columns is for CSV and TSV without a header; omit it")
        root = find_image_root(options.image_root, location)
        yield from _merge_captions(_to_row(record, root, options.default_split) for record in read(location, options))


def _to_row(record: _Record, root: str, default_split: str) -> tuple[ManifestRow, bool]:
    """Returns a row and whether to merge it with adjacent rows of its image. Rows with caption lists are not merged."""
    origin, columns, values = record
    uri = parse_text(values.get(columns.uri), origin, columns.uri).strip()
    row = ManifestRow(
        image_id=uri if columns.id is None else parse_id(values.get(columns.id), origin, columns.id),
        uri=resolve_uri(uri, root),
        split=parse_split_column(values, columns.split, origin, default_split),
        captions=parse_caption_columns(values, columns.captions, origin),
        origin=origin,
    )
    has_list = any(isinstance(values.get(name), list) for name in columns.captions)
    return row, bool(columns.captions) and not has_list


def parse_split_column(values: Mapping[str, Any], column: str | None, origin: str, default: str) -> str:
    """Returns the split in `column` of a row, or `default` if the column or its value is missing."""
    return default if column is None else parse_optional(parse_id, values.get(column), origin, column, default)


def parse_caption_columns(values: Mapping[str, Any], columns: Sequence[str], origin: str) -> tuple[str, ...]:
    """Returns the captions in `columns` of a row; see `parse_captions`."""
    return tuple(caption for name in columns for caption in parse_captions(values.get(name), origin, name))


def _merge_captions(rows: Iterable[tuple[ManifestRow, bool]]) -> Iterator[ManifestRow]:
    """Merges adjacent mergeable rows of the same image. Others stay separate, so that duplicate ids are detected."""
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
    return (row.image_id, row.uri) if mergeable else object()  # a new object is equal to no other key


def _read_delimited(location: Location, options: SourceOptions) -> Iterator[_Record]:
    lines = read_lines(location)
    first = next(lines, "")
    delimiter = _detect_delimiter(first, location, options)
    is_tsv = delimiter == "\t" and ("\t" in first or get_text_extension(location.name) == ".tsv")
    quoting: Literal[0, 3] = csv.QUOTE_NONE if is_tsv and not options.tsv_quotes else csv.QUOTE_MINIMAL
    lines = itertools.chain([first], lines)
    rows = _parse_delimited(lines, location, delimiter, quoting)
    header = [name.strip() for name in options.columns or next(rows, (1, []))[1]]
    columns = select_columns(header, options, f"{location.address}, line 1")
    # In `image,caption` text files, such as Kaggle's Flickr8k, captions contain unquoted commas.
    is_text = get_text_extension(location.name) == ".txt" and not is_tsv
    if is_text and header == [columns.uri, *columns.captions] and len(header) == 2:
        rows = _split_lines(lines, delimiter, 1 if options.columns else 2)
    for number, cells in rows:
        if len(cells) != len(header):
            hint = "quote cells that contain the delimiter or a line break"
            raise DatasetError(
                f"{location.address}, line {number}: expected {len(header)} cells, got {len(cells)}; "
                + (hint if quoting == csv.QUOTE_MINIMAL else f"{hint} and use --tsv-quotes, or remove these characters")
            )
        values: dict[str, Any] = dict(zip(header, cells, strict=True))
        for name in columns.names:
            values[name] = parse_cell(values[name], numeric=name == columns.id)
        yield _Record(f"{location.address}, line {number}", columns, values)


def _detect_delimiter(first: str, location: Location, options: SourceOptions) -> str:
    if get_text_extension(location.name) == ".tsv" or ("\t" in first and options.columns):
        return "\t"
    if options.columns:  # the first delimiter, since captions may contain the others more often
        return min(",;|", key=lambda delimiter: first.find(delimiter) % (len(first) + 1))
    return max("\t,;|", key=first.count)


def _split_lines(lines: Iterable[str], delimiter: str, start: int) -> Iterator[tuple[int, list[str]]]:
    """Yields the line number and two cells of each line: the text before and after the first delimiter."""
    for number, line in enumerate(lines, start):
        if line.strip():
            cells = line.rstrip("\r\n").split(delimiter, 1)
            quoted = [_QUOTED_CELL.fullmatch(cell) for cell in cells]
            yield (
                number,
                [match[1].replace('""', '"') if match else cell for match, cell in zip(quoted, cells, strict=True)],
            )


def _parse_delimited(
    lines: Iterable[str], location: Location, delimiter: str, quoting: Literal[0, 3]
) -> Iterator[tuple[int, list[str]]]:
    """Yields the line number and the cells of each row."""
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for cells in reader:
            if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
                raise DatasetError(
                    f"{location.address}, line {reader.line_num}: expected no cell with both a tab and a line break, "
                    "got one, probably because of an unpaired quote; omit --tsv-quotes"
                )
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise DatasetError(f"{location.address}, line {reader.line_num}: {error}; check the quotes") from error


def _read_json(location: Location, options: SourceOptions) -> Iterator[_Record]:
    """Yields JSON objects. Columns are selected per object, because objects may have different keys."""
    optional = (options.uri_column, options.id_column, options.split_column, *options.caption_columns)
    requested = [name for name in optional if name is not None]
    absent = set(requested)
    selected: dict[tuple[str, ...], Columns] = {}
    first: _Record | None = None
    for origin, values in _read_objects(location):
        absent -= values.keys()
        names = tuple(dict.fromkeys((*values, *requested)))
        if names not in selected:
            selected[names] = select_columns(names, options, origin)
        record = _Record(origin, selected[names], values)
        first = first or record
        if (record.columns.id is None) != (first.columns.id is None):
            has, lacks = (first, record) if record.columns.id is None else (record, first)
            raise DatasetError(
                f"{lacks.origin}: expected an image id {has.columns.id} as in {has.origin}, got none; add it, or "
                "specify the column with --id-column"
            )
        yield record
    if first is not None and absent:
        raise ConfigError(f"{location.address}: column {', '.join(map(repr, sorted(absent)))} not found")


def _read_objects(location: Location) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a JSON Lines file or a JSON array, each preceded by its origin for error messages."""
    lines = enumerate(read_lines(location), 1)
    first_number, first = next(((number, line) for number, line in lines if line.strip()), (0, ""))
    if first.lstrip().startswith("[") and get_text_extension(location.name) == ".json":
        for index, value in enumerate(parse_list(load_json(location), location.address, "records")):
            origin = f"{location.address}, [{index}]"
            yield origin, parse_object(value, origin)
        return
    for number, line in itertools.chain([(first_number, first)], lines):
        if line.strip():
            origin = f"{location.address}, line {number}"
            try:
                yield origin, parse_object(parse_json(line.strip(), origin), origin)
            except DatasetError as error:
                raise DatasetError(f"{error}; expected one object per line") from error


def _read_parquet(location: Location, options: SourceOptions) -> Iterator[_Record]:
    with open_file(location) as file:
        parquet = open_parquet(file, location)
        columns = select_columns(parquet.schema_arrow.names, options, location.address)
        for number, values in enumerate(read_parquet_columns(parquet, columns.names, location), 1):
            yield _Record(f"{location.address}, row {number}", columns, values)


def open_parquet(file: BinaryIO, location: Location) -> pq.ParquetFile:
    """Opens a Parquet file. Reads are buffered, so that memory need not hold whole row groups.

    Raises:
        DatasetError: the file is not a Parquet file, or is damaged.
    """
    try:
        return pq.ParquetFile(file, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{location.address} is not Parquet, or is damaged: {error}") from error


def read_parquet_columns(
    parquet: pq.ParquetFile, columns: Sequence[str], location: Location
) -> Iterator[dict[str, Any]]:
    """Yields each row as a dictionary of Python values by column. A dotted name selects a field of a struct.

    A map becomes the list of its values. Bytes that are not UTF-8 become lone surrogates (`surrogateescape`).

    Raises:
        DatasetError: the file is damaged.
    """
    if not columns:
        yield from ({} for _ in range(parquet.metadata.num_rows))
        return
    try:
        for batch in parquet.iter_batches(batch_size=4096, columns=list(columns)):
            names = batch.schema.names
            for values in zip(*map(_to_python, batch.columns), strict=True):
                yield dict(zip(names, values, strict=True))
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DatasetError(f"{location.address} is damaged: {error}") from error


def _to_python(column: pa.Array) -> list[Any]:
    if pa.types.is_map(column.type):
        return [None if entries is None else [value for _, value in entries] for entries in column.to_pylist()]
    try:
        values: list[Any] = column.to_pylist()
        return values
    except UnicodeDecodeError:
        return [_to_text(value) for value in column]


def _to_text(value: pa.Scalar) -> Any:
    if not value.is_valid:
        return None
    if isinstance(value, pa.ListScalar | pa.LargeListScalar):
        return [_to_text(item) for item in value.values]
    if isinstance(value, pa.StringScalar | pa.LargeStringScalar):
        return value.as_buffer().to_pybytes().decode(errors="surrogateescape")
    return value.as_py()


_READERS: Mapping[str, Callable[[Location, SourceOptions], Iterator[_Record]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
