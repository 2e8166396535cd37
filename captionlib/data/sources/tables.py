"""Reads tables of image paths or URLs with captions: CSV, TSV, text, JSON and Parquet files."""

import csv
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.sources.columns import Columns, select_columns
from captionlib.data.sources.locations import (
    Location,
    find_files,
    find_image_root,
    get_uncompressed_extension,
    load_json,
    open_file,
    read_lines,
    resolve_uri,
)
from captionlib.data.sources.rows import ImageRecord, SkipCounter, SourceOptions
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
from captionlib.errors import ConfigError, DatasetError, EntryError

__all__ = [
    "TABLE_EXTENSIONS",
    "open_parquet",
    "parse_caption_columns",
    "parse_split_column",
    "parse_version_column",
    "read_parquet_columns",
    "read_tables",
]

TABLE_EXTENSIONS = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"})

_QUOTED_CELL = re.compile(r'\s*"((?:[^"]|"")*)"\s*', re.DOTALL)


class _Record(NamedTuple):
    """A table row before parsing."""

    origin: str  # file and line or row number, for error messages
    columns: Columns
    values: Mapping[str, Any]  # by column


def read_tables(addresses: Sequence[str], options: SourceOptions, skips: SkipCounter) -> Iterator[ImageRecord]:
    """Yields the images of tables in file order.

    Consecutive rows of the same image are merged into one row with all their captions, unless they have caption lists.
    Without an id column, the id is the uri as it is in the table. URIs may be relative to `options.image_root`
    or, by default, to the table's folder.
    """
    for location in find_files(addresses, TABLE_EXTENSIONS):
        read = _READERS.get(get_uncompressed_extension(location.name), _read_delimited)
        if options.columns and read is not _read_delimited:
            raise ConfigError(f"{location.address}: --columns is for CSV and TSV without a header; omit it")
        root = find_image_root(options.image_root, location)
        yield from _merge_captions(_parse_records(read(location, options, skips), root, options, skips), skips)


def _parse_records(
    records: Iterable[_Record], root: str, options: SourceOptions, skips: SkipCounter
) -> Iterator[tuple[ImageRecord, bool]]:
    """Yields each row, and whether it may be merged: it has caption columns, and none of them contains a list."""
    for origin, columns, values in records:
        try:
            uri = parse_text(values.get(columns.uri), origin, columns.uri).strip()
            image_id = uri if columns.id is None else parse_id(values.get(columns.id), origin, columns.id)
            split = parse_split_column(values, columns.split, origin, options.default_split)
            version = parse_version_column(values, columns.version, origin)
        except EntryError as error:
            skips.reject_image(error.reason, error.problem)
            continue
        captions: tuple[str, ...] = ()
        mergeable = False
        if columns.captions:
            captions = parse_caption_columns(values, columns.captions, origin, options, skips)
            mergeable = not any(isinstance(values.get(name), list) for name in columns.captions)
        yield ImageRecord(image_id, resolve_uri(uri, root), split, captions, origin, version), mergeable


def parse_split_column(values: Mapping[str, Any], column: str | None, origin: str, default: str) -> str:
    return default if column is None else parse_optional(parse_id, values.get(column), origin, column, default)


def parse_version_column(values: Mapping[str, Any], column: str | None, origin: str) -> str:
    return "" if column is None else parse_optional(parse_id, values.get(column), origin, column)


def parse_caption_columns(
    values: Mapping[str, Any], columns: Sequence[str], origin: str, options: SourceOptions, skips: SkipCounter
) -> tuple[str, ...]:
    """Returns the captions in `columns` of a row; see `parse_captions`. Invalid captions are skipped."""
    captions: tuple[str, ...] = ()
    for name in columns:
        value = values.get(name)
        if isinstance(value, dict) and options.caption_language is not None:
            value = value.get(options.caption_language)
        try:
            captions += parse_captions(value, origin, name)
        except EntryError as error:
            skips.reject_captions(error.reason, error.problem)
    return captions


def _merge_captions(rows: Iterable[tuple[ImageRecord, bool]], skips: SkipCounter) -> Iterator[ImageRecord]:
    """Merges adjacent rows of the same image into one row with all their captions, if both rows may be merged."""
    previous: ImageRecord | None = None
    previous_mergeable = False
    for row, mergeable in rows:
        if previous is None:
            previous, previous_mergeable = row, mergeable
        elif not (mergeable and previous_mergeable and row.uri == previous.uri and row.image_id == previous.image_id):
            yield previous
            previous, previous_mergeable = row, mergeable
        elif row.split == previous.split:
            previous.captions += row.captions
        else:
            skips.reject_captions(
                "second split for the same image",
                f"{row.origin}: expected split {previous.split!r} for image {row.image_id}, as in {previous.origin}, "
                f"got {row.split!r}",
            )
    if previous is not None:
        yield previous


def _read_delimited(location: Location, options: SourceOptions, skips: SkipCounter) -> Iterator[_Record]:
    lines = read_lines(location)
    first = next(lines, "")
    delimiter = _detect_delimiter(first, location, options)
    is_tsv = delimiter == "\t" and ("\t" in first or get_uncompressed_extension(location.name) == ".tsv")
    quoting: Literal[0, 3] = csv.QUOTE_NONE if is_tsv and not options.tsv_quotes else csv.QUOTE_MINIMAL
    lines = itertools.chain([first], lines)
    rows = _parse_delimited(lines, location, delimiter, quoting)
    header = [name.strip() for name in options.columns or next(rows, (1, []))[1]]
    columns = select_columns(header, options, f"{location.address}, line 1")
    # In `image,caption` text files, such as Kaggle's Flickr8k, captions contain unquoted commas.
    is_text = get_uncompressed_extension(location.name) == ".txt" and not is_tsv
    if is_text and header == [columns.uri, *columns.captions] and len(header) == 2:
        rows = _split_lines(lines, delimiter, 1 if options.columns else 2)
    ends_with_caption = delimiter != "\t" and columns.captions == tuple(header[-1:])
    selected = [(name, header.index(name), name == columns.id) for name in columns.names]
    for number, cells in rows:
        while len(cells) > len(header) and not cells[-1].strip():  # after a delimiter at the end of the line
            cells.pop()
        if len(cells) > len(header) and ends_with_caption:  # the caption contains unquoted delimiters
            cells[len(header) - 1 :] = [delimiter.join(cells[len(header) - 1 :])]
        if len(cells) != len(header):
            hint = "; quote cells that contain the delimiter" + " and use --tsv-quotes" * (quoting == csv.QUOTE_NONE)
            skips.reject_image(
                "row with missing cells" if len(cells) < len(header) else "row with additional cells",
                f"{location.address}, line {number}: expected {len(header)} cells, got {len(cells)}{hint}",
            )
            continue
        values = {name: parse_cell(cells[index], numeric) for name, index, numeric in selected}
        yield _Record(f"{location.address}, line {number}", columns, values)


def _detect_delimiter(first: str, location: Location, options: SourceOptions) -> str:
    if get_uncompressed_extension(location.name) == ".tsv" or ("\t" in first and options.columns):
        return "\t"
    if options.columns:  # the first delimiter in the line; captions may contain other delimiters more often
        return min(",;|", key=lambda delimiter: first.find(delimiter) % (len(first) + 1))
    return max("\t,;|", key=first.count)


def _split_lines(lines: Iterable[str], delimiter: str, first_number: int) -> Iterator[tuple[int, list[str]]]:
    """Yields the line number and two cells of each line: the text before and after the first delimiter."""
    for number, line in enumerate(lines, first_number):
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


def _read_json(location: Location, options: SourceOptions, skips: SkipCounter) -> Iterator[_Record]:
    """Yields JSON objects. Columns are selected per object, because objects may have different keys.

    Objects without an image id are skipped if the first object has one.
    """
    columns = (options.uri_column, options.id_column, options.split_column, options.version_column)
    requested = [name for name in (*columns, *options.caption_columns) if name is not None]
    absent = set(requested)
    selected: dict[tuple[str, ...], Columns] = {}
    first: _Record | None = None
    invalid: ConfigError | None = None
    for origin, values in _read_objects(location, skips):
        absent -= values.keys()
        names = tuple(dict.fromkeys((*values, *requested)))
        try:
            if names not in selected:
                selected[names] = select_columns(names, options, origin)
        except ConfigError as error:  # skips this object; the error is raised below if all objects are invalid
            invalid = invalid or error
            skips.reject_image("object without an image uri, or with ambiguous keys", str(error))
            continue
        record = _Record(origin, selected[names], values)
        first = first or record
        if first.columns.id is not None and record.columns.id is None:
            skips.reject_image(
                "object without an image id",
                f"{origin}: expected an image id at key {first.columns.id!r} as in {first.origin}, got none",
            )
        elif first.columns.id is None and record.columns.id is not None:
            raise DatasetError(
                f"{first.origin}: expected an image id at key {record.columns.id!r} as in {origin}, got none; add it, "
                "or specify another key with --id-column"
            )
        else:
            yield record
    if first is None and invalid is not None:
        raise invalid
    if first is not None and absent:
        raise ConfigError(f"{location.address}: column {', '.join(map(repr, sorted(absent)))} not found")


def _read_objects(location: Location, skips: SkipCounter) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the origin and the values of each object in a JSON Lines file or a JSON array."""
    lines = ((number, line) for number, line in enumerate(read_lines(location), 1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    is_array = first[1].lstrip().startswith("[") and get_uncompressed_extension(location.name) == ".json"
    entries: Iterator[tuple[str, Any]]
    if is_array:
        records = parse_list(load_json(location), location.address, "records")
        entries = ((f"{location.address}, [{index}]", record) for index, record in enumerate(records))
    else:
        entries = ((f"{location.address}, line {number}", line) for number, line in itertools.chain([first], lines))
    for origin, entry in entries:
        try:
            yield origin, parse_object(entry, origin) if is_array else _parse_line(entry, origin)
        except EntryError as error:
            skips.reject_image(error.reason, error.problem)


def _parse_line(line: str, origin: str) -> dict[str, Any]:
    try:
        return parse_object(parse_json(line.strip(), origin), origin)
    except EntryError:
        raise
    except DatasetError as error:
        raise EntryError("line that is not a JSON object", f"{error}; expected one object per line") from error


def _read_parquet(location: Location, options: SourceOptions, skips: SkipCounter) -> Iterator[_Record]:
    with open_file(location) as file:
        parquet = open_parquet(file, location)
        columns = select_columns(parquet.schema_arrow.names, options, location.address)
        for number, values in enumerate(read_parquet_columns(parquet, columns.names, location, options), 1):
            yield _Record(f"{location.address}, row {number}", columns, values)


def open_parquet(file: BinaryIO, location: Location) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, buffer_size=1 << 20)  # without a buffer, it would read whole row groups
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{location.address} is not Parquet, or is damaged: {error}") from error


def read_parquet_columns(
    parquet: pq.ParquetFile, columns: Sequence[str], location: Location, options: SourceOptions
) -> Iterator[dict[str, Any]]:
    """Yields each row as a dictionary of Python values by column. A dotted name selects a field of a struct.

    A map becomes the list of its values; if `options.caption_language` is set, only the value with this key is kept.
    Bytes of text that are not UTF-8 become lone surrogates (`surrogateescape`).
    """
    if not columns:
        yield from ({} for _ in range(parquet.metadata.num_rows))
        return
    try:
        for batch in parquet.iter_batches(batch_size=4096, columns=list(columns)):
            names = batch.schema.names
            values_by_column = [_to_python(column, options.caption_language) for column in batch.columns]
            for values in zip(*values_by_column, strict=True):
                yield dict(zip(names, values, strict=True))
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DatasetError(f"{location.address} is damaged: {error}") from error


def _to_python(column: pa.Array, language: str | None) -> list[Any]:
    if pa.types.is_map(column.type):
        return [
            None if entries is None else [value for key, value in entries if language in (None, key)]
            for entries in column.to_pylist()
        ]
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


_READERS: Mapping[str, Callable[[Location, SourceOptions, SkipCounter], Iterator[_Record]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
