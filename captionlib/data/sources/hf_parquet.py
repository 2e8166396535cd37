"""Reads Parquet with embedded images, in the Hugging Face layout `image: struct<bytes, path>`."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.sources.columns import (
    ID_NAMES,
    SPLIT_NAMES,
    list_columns,
    select_caption_columns,
    select_column,
    to_captions,
    to_text,
)
from captionlib.data.sources.locations import Location, find_files
from captionlib.data.sources.rows import ManifestRow, ReportSkip, SourceOptions
from captionlib.data.sources.tables import open_parquet, read_parquet_columns
from captionlib.errors import ConfigError

__all__ = ["find_image_columns", "read_hf_parquet"]


def read_hf_parquet(addresses: Sequence[str], options: SourceOptions, report_skip: ReportSkip) -> Iterator[ManifestRow]:
    """Yields the images in the rows of Parquet files. Image bytes are not read; uris name the file, row and column.

    The id is the value of the id column, or else the image's path, or else the file's name and the row number from 0.

    Raises:
        ConfigError: a column is missing.
        DatasetError: a file cannot be read.
    """
    for location in find_files(addresses, frozenset({".parquet"})):
        with location.fs.open(location.path, "rb") as file:
            yield from _read_rows(open_parquet(file, location), location, options)


def find_image_columns(schema: pa.Schema) -> list[str]:
    """Returns the columns that hold encoded images."""
    return [field.name for field in schema if pa.types.is_struct(field.type) and _has_bytes(field.type)]


def _has_bytes(struct: pa.StructType) -> bool:
    index = struct.get_field_index("bytes")
    return index >= 0 and struct.field(index).type in {pa.binary(), pa.large_binary()}


def _read_rows(parquet: pq.ParquetFile, location: Location, options: SourceOptions) -> Iterator[ManifestRow]:
    schema = parquet.schema_arrow
    image = _select_image_column(schema, options.uri_column, location.address)
    image_id = select_column(schema.names, options.id_column, ID_NAMES, location.address)
    split = select_column(schema.names, options.split_column, SPLIT_NAMES, location.address)
    captions = select_caption_columns(schema.names, options.caption_columns, location.address)
    path = f"{image}.path" if schema.field(image).type.get_field_index("path") >= 0 else None
    columns = [name for name in (image_id, split, *captions, path) if name is not None]
    for number, record in enumerate(read_parquet_columns(parquet, columns, location)):
        origin = f"{location.address}, row {number + 1}"
        if image_id is not None:
            row_id = to_text(record[image_id], origin, image_id)
        else:
            row_id = (record.get(image) or {}).get("path") or f"{location.name}#{number}"
        yield ManifestRow(
            image_id=row_id,
            uri=f"{location.address}#row={number}&column={image}.bytes",
            split=(to_text(record[split], origin, split) if split is not None else "") or options.default_split,
            captions=to_captions([record[name] for name in captions], origin),
            origin=origin,
        )


def _select_image_column(schema: pa.Schema, name: str | None, table: str) -> str:
    columns = find_image_columns(schema)
    if name is not None and name in columns:
        return name
    if name is not None or not columns:
        expected = "a column" if name is None else f"column {name!r}"
        raise ConfigError(
            f"{table}: expected {expected} of type struct<bytes, path>, got {list_columns(schema.names)}; "
            "name the image column with --uri-column, or use --format table if the rows hold uris"
        )
    return columns[0]
