"""Reads Parquet files with an image column of type binary, or `struct<bytes, path>` as on Hugging Face."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.sources.columns import (
    ID_NAMES,
    SPLIT_NAMES,
    list_columns,
    select_caption_columns,
    select_column,
)
from captionlib.data.sources.locations import Location, find_files, open_file
from captionlib.data.sources.rows import ManifestRow, SkipCounter, SourceOptions
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

_BYTES_NAMES = frozenset({"image", "image_bytes", "img", "jpg", "jpeg", "png", "webp", "bytes"})


def read_hf_parquet(addresses: Sequence[str], options: SourceOptions, skips: SkipCounter) -> Iterator[ManifestRow]:
    """Yields one image per row of Parquet files. Each uri refers to a file, row and column; image bytes are not read.

    The id is the value of the id column. Without one, it is the image's path if paths are unique in the file, and
    otherwise the file name and the 0-based row number.

    Args:
        addresses: paths, URLs or globs of the files.
        options: how to read the files.
        skips: counter of skipped rows and captions.

    Raises:
        ConfigError: a column is missing or ambiguous.
        DatasetError: a file cannot be read.
    """
    for location in find_files(addresses, frozenset({".parquet"})):
        with open_file(location) as file:
            yield from _read_rows(open_parquet(file, location), location, options, skips)


def find_image_columns(schema: pa.Schema) -> list[str]:
    """Returns the columns of encoded images: structs with a field `bytes`, and binary columns with a common name."""
    return [
        field.name
        for field in schema
        if _is_image_struct(field.type) or (_is_binary(field.type) and field.name.strip().lower() in _BYTES_NAMES)
    ]


def _is_binary(data_type: pa.DataType) -> bool:
    return data_type in {pa.binary(), pa.large_binary(), pa.binary_view()}


def _can_contain_images(data_type: pa.DataType) -> bool:
    return _is_binary(data_type) or _is_image_struct(data_type)


def _is_image_struct(data_type: pa.DataType) -> bool:
    index = data_type.get_field_index("bytes") if pa.types.is_struct(data_type) else -1
    return index >= 0 and _is_binary(data_type.field(index).type)


def _read_rows(
    parquet: pq.ParquetFile, location: Location, options: SourceOptions, skips: SkipCounter
) -> Iterator[ManifestRow]:
    schema = parquet.schema_arrow
    image = _select_image_column(schema, options.image_column, location.address)
    image_type = schema.field(image).type
    bytes_column = f"{image}.bytes" if _is_image_struct(image_type) else image
    has_path = _is_image_struct(image_type) and image_type.get_field_index("path") >= 0
    image_id = select_column(schema.names, options.id_column, ID_NAMES, location.address)
    split = select_column(schema.names, options.split_column, SPLIT_NAMES, location.address)
    captions = select_caption_columns(schema.names, options.caption_columns, location.address)
    path = f"{image}.path" if has_path and image_id is None and _is_unique(parquet, f"{image}.path", location) else None
    version = select_column(schema.names, options.version_column, (), location.address)
    file_version = version_from_file(location)  # short string that changes when the file does
    columns = [name for name in (image_id, split, version, *captions, path) if name is not None]
    for number, record in enumerate(read_parquet_columns(parquet, columns, location, options)):
        origin = f"{location.address}, row {number + 1}"
        try:
            if image_id is not None:
                row_id = parse_id(record[image_id], origin, image_id)
            else:
                name = (record.get(image) or {}).get("path") if path else None
                row_id = parse_optional(parse_text, name, origin, f"{image}.path", f"{location.name}#{number}")
            row_split = parse_split_column(record, split, origin, options.default_split)
            image_version = parse_version_column(record, version, origin) or f"{file_version}-{number:x}"
        except EntryError as error:
            skips.reject_image(error.reason, error.problem)
            continue
        yield ManifestRow(
            image_id=row_id,
            uri=f"{location.address}#row={number}&column={bytes_column}",
            split=row_split,
            captions=parse_caption_columns(record, captions, origin, options, skips),
            origin=origin,
            version=image_version,
        )


def _is_unique(parquet: pq.ParquetFile, column: str, location: Location) -> bool:
    try:
        values = parquet.read([column]).flatten().column(0)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{location.address} is damaged: {error}") from error
    paths = values.drop_null()
    return len(paths.unique()) == len(paths)


def _select_image_column(schema: pa.Schema, name: str | None, table: str) -> str:
    columns = find_image_columns(schema)
    if name is not None:
        columns = [field.name for field in schema if field.name == name and _can_contain_images(field.type)]
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
