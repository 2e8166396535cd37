"""Reads Parquet files with an image column of type binary, or `struct<bytes, path>` as on Hugging Face."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.sources.columns import list_columns, select_columns
from captionlib.data.sources.locations import Location, find_files, open_file
from captionlib.data.sources.rows import ImageRecord, SkipCounter, SourceOptions
from captionlib.data.sources.tables import (
    open_parquet,
    parse_caption_columns,
    parse_split_column,
    parse_version_column,
    read_parquet_columns,
)
from captionlib.data.sources.values import parse_id, parse_optional, parse_text
from captionlib.data.sources.versions import version_from_file
from captionlib.errors import ConfigError, DatasetError, EntryError

__all__ = ["find_image_columns", "read_hf_parquet"]

_IMAGE_NAMES = frozenset({"image", "image_bytes", "img", "jpg", "jpeg", "png", "webp", "bytes"})


def read_hf_parquet(addresses: Sequence[str], options: SourceOptions, skips: SkipCounter) -> Iterator[ImageRecord]:
    """Yields one image per row of Parquet files. Each uri refers to a file, row and column; image bytes are not read.

    The id is the value of the id column. If there is none, the id is the image's path. If there are no paths, or paths
    repeat in the file, the id consists of the file name and the 0-based row number.
    """
    for location in find_files(addresses, frozenset({".parquet"})):
        with open_file(location) as file:
            yield from _read_rows(open_parquet(file, location), location, options, skips)


def find_image_columns(schema: pa.Schema) -> list[str]:
    """Returns the image columns: structs with a binary field `bytes`, and binary columns with a conventional name."""
    return [
        field.name
        for field in schema
        if _is_image_struct(field.type) or (_is_binary(field.type) and field.name.strip().lower() in _IMAGE_NAMES)
    ]


def _is_binary(data_type: pa.DataType) -> bool:
    return data_type in {pa.binary(), pa.large_binary(), pa.binary_view()}


def _is_image_struct(data_type: pa.DataType) -> bool:
    index = data_type.get_field_index("bytes") if pa.types.is_struct(data_type) else -1
    return index >= 0 and _is_binary(data_type.field(index).type)


def _read_rows(
    parquet: pq.ParquetFile, location: Location, options: SourceOptions, skips: SkipCounter
) -> Iterator[ImageRecord]:
    schema = parquet.schema_arrow
    image_column = _select_image_column(schema, options.image_column, location.address)
    image_type = schema.field(image_column).type
    bytes_column = f"{image_column}.bytes" if _is_image_struct(image_type) else image_column
    has_path = _is_image_struct(image_type) and image_type.get_field_index("path") >= 0
    columns = select_columns(schema.names, options, location.address, image_column)
    path_column = f"{image_column}.path"
    uses_path = has_path and columns.id is None and _is_unique(parquet, path_column, location)
    file_version = version_from_file(location)  # changes when the file changes
    names = [name for name in (columns.id, columns.split, columns.version, *columns.captions) if name is not None]
    names += [path_column] * uses_path
    for number, record in enumerate(read_parquet_columns(parquet, names, location, options)):
        origin = f"{location.address}, row {number + 1}"
        try:
            if columns.id is not None:
                image_id = parse_id(record.get(columns.id), origin, columns.id)
            else:
                path = (record.get(image_column) or {}).get("path") if uses_path else None
                image_id = parse_optional(parse_text, path, origin, path_column, f"{location.name}#{number}")
            split = parse_split_column(record, columns.split, origin, options.default_split)
            version = parse_version_column(record, columns.version, origin) or f"{file_version}-{number:x}"
        except EntryError as error:
            skips.reject_image(error.reason, error.problem)
            continue
        yield ImageRecord(
            image_id=image_id,
            uri=f"{location.address}#row={number}&column={bytes_column}",
            split=split,
            captions=parse_caption_columns(record, columns.captions, origin, options, skips),
            origin=origin,
            version=version,
        )


def _is_unique(parquet: pq.ParquetFile, column: str, location: Location) -> bool:
    try:
        values = parquet.read([column]).flatten().column(0)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{location.address} is damaged: {error}") from error
    values = values.drop_null()
    return len(values.unique()) == len(values)


def _select_image_column(schema: pa.Schema, name: str | None, table: str) -> str:
    columns = find_image_columns(schema)
    if name is not None:
        columns = [
            field.name
            for field in schema
            if field.name == name and (_is_binary(field.type) or _is_image_struct(field.type))
        ]
    if not columns:
        expected = "a column" if name is None else f"column {name!r}"
        raise ConfigError(
            f"{table}: expected {expected} of type struct<bytes, path> or binary, got {list_columns(schema.names)}; "
            "specify the image column with --image-column, or use --format table if the rows contain uris"
        )
    if len(columns) > 1 and columns.count("image") != 1:
        raise ConfigError(
            f"{table}: expected one column of images, got {', '.join(columns)}; select one with --image-column"
        )
    return "image" if len(columns) > 1 else columns[0]
