"""Reads Parquet with the images' bytes in the rows, the Hugging Face layout `image: struct<bytes, path>`."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.data.sources.columns import (
    ID_NAMES,
    SPLIT_NAMES,
    choose_captions,
    choose_column,
    describe,
    to_captions,
    to_text,
)
from captionlib.data.sources.locations import Location, find_files
from captionlib.data.sources.rows import ManifestRow, ReportSkip, SourceOptions
from captionlib.data.sources.tables import open_parquet, read_parquet_columns
from captionlib.errors import ConfigError

__all__ = ["image_columns", "read_hf_parquet"]


def read_hf_parquet(addresses: Sequence[str], options: SourceOptions, report_skip: ReportSkip) -> Iterator[ManifestRow]:
    """The images in the rows of Parquet files; their bytes stay unread, and the uri names file, row and column.

    The id is the id column's, or else the image's path, or where that is missing the file's name and the row's number,
    counted from 0. Nothing is skipped.

    Raises:
        ConfigError: a column is missing.
        DatasetError: a file cannot be read.
    """
    for location in find_files(addresses, frozenset({".parquet"})):
        with location.fs.open(location.path, "rb") as file:
            yield from _read_file(open_parquet(file, location), location, options)


def image_columns(schema: pa.Schema) -> list[str]:
    """The columns that hold encoded images."""
    return [field.name for field in schema if pa.types.is_struct(field.type) and _has_bytes(field.type)]


def _has_bytes(struct: pa.StructType) -> bool:
    at = struct.get_field_index("bytes")
    return at >= 0 and struct.field(at).type in {pa.binary(), pa.large_binary()}


def _read_file(parquet: pq.ParquetFile, location: Location, options: SourceOptions) -> Iterator[ManifestRow]:
    schema = parquet.schema_arrow
    image = _choose_image(schema, options.uri_column, location.address)
    image_id = choose_column(schema.names, options.id_column, ID_NAMES, location.address)
    split = choose_column(schema.names, options.split_column, SPLIT_NAMES, location.address)
    captions = choose_captions(schema.names, options.caption_columns, location.address)
    path = f"{image}.path" if schema.field(image).type.get_field_index("path") >= 0 else None
    wanted = [name for name in (image_id, split, *captions, path) if name is not None]
    for number, record in enumerate(read_parquet_columns(parquet, wanted, location)):
        origin = f"{location.address}, row {number + 1}"
        if image_id is not None:
            identity = to_text(record[image_id], origin, image_id)
        else:
            identity = (record.get(image) or {}).get("path") or f"{location.name}#{number}"
        yield ManifestRow(
            identity,
            f"{location.address}#row={number}&column={image}.bytes",
            (to_text(record[split], origin, split) if split is not None else "") or options.default_split,
            to_captions([record[name] for name in captions], origin),
            origin,
        )


def _choose_image(schema: pa.Schema, asked: str | None, table: str) -> str:
    found = image_columns(schema)
    if asked is not None and asked in found:
        return asked
    if asked is not None or not found:
        raise ConfigError(
            f"{table}: no column {asked or ''!r} of struct<bytes, path>; it has {describe(schema.names)}; name the one "
            "with the images by --uri-column, or read it as a table of uris by --format table"
        )
    return found[0]
