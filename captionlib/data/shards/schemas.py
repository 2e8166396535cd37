"""Arrow schemas of the datasets: manifest (images and reference captions), features, captions, embeddings, duplicates.

Every kind of dataset has its own schema version. A new version is needed only if a column is removed or changes its
meaning. A column that is added later is nullable. It is null in the rows of older datasets.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from captionlib.errors import ImageError

__all__ = [
    "COLUMN_DESCRIPTIONS",
    "DUPLICATES_SCHEMA",
    "FAILURES_SCHEMA",
    "MANIFEST_SCHEMA",
    "SCHEMA_VERSIONS",
    "add_missing_columns",
    "captions_schema",
    "embeddings_schema",
    "failure_row",
    "features_schema",
    "upgrade_schema",
]

SCHEMA_VERSIONS = {"manifest": 1, "features": 1, "captions": 1, "embeddings": 1, "duplicates": 1}


def _schema(*text: str, **columns: pa.DataType) -> pa.Schema:
    """Returns a schema of text columns and other columns, none of which may contain nulls."""
    types = dict.fromkeys(text, pa.string()) | columns
    return pa.schema([pa.field(name, data_type, nullable=False) for name, data_type in types.items()])


_VERSION = pa.field("version", pa.string())
_IMAGE_FILE_FIELDS = [
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("content_hash", pa.string()),
]

MANIFEST_SCHEMA = pa.schema([*_schema("image_id", "uri"), _VERSION, *_schema("split", captions=pa.list_(pa.string()))])
FAILURES_SCHEMA = pa.schema([*_schema("image_id", "uri"), _VERSION, *_schema("stage", "error", "message")])
DUPLICATES_SCHEMA = _schema("image_id", "group", kept=pa.bool_(), similarity=pa.float32())
# Shown in the reference documentation.
COLUMN_DESCRIPTIONS = {
    "image_id": "Id of the image, unique within a dataset.",
    "uri": "Path or URL of the image.",
    "version": "Version of the image's file in the source; it changes when the file does. Null if unknown.",
    "split": "Split that contains the image, such as train, val or test; empty if unknown.",
    "captions": "Reference captions, written by humans.",
    "width": "Width of the image in pixels, after the rotation in its EXIF data; null if unknown.",
    "height": "Height of the image in pixels, after the rotation in its EXIF data; null if unknown.",
    "content_hash": "Hash of the bytes of the image's file: 16 hexadecimal digits; null if unknown.",
    "features": "Image features from the encoder: a vector, or a feature map flattened position by position.",
    "caption": "Best caption.",
    "log_prob": "Natural logarithm of the probability of the caption, summed over its tokens.",
    "tokens": "Number of tokens in the caption, including the end token.",
    "image_text_score": "Cosine similarity of caption and image, from an image-text model; null if there is none.",
    "candidates": "Candidate captions for the image, best first.",
    "attention": "Attention weights of each token over the positions of the feature map; each row sums to 1.",
    "embedding": "Embedding of the image: a unit vector in the joint space of images and captions.",
    "group": "Id of the group of duplicates, which is the id of its kept image.",
    "kept": "True for the one image of the group to keep; false for its duplicates.",
    "similarity": "Cosine similarity of the embeddings of this image and the kept image.",
    "stage": "Step that failed: fetch or decode.",
    "error": "Category under which the failure is counted, such as NotFound.",
    "message": "Description of the error.",
}


def add_missing_columns(rows: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Returns rows with exactly the columns of a schema. Missing nullable columns are filled with nulls.

    Raises:
        KeyError: the rows lack a column that is not nullable.
    """
    if rows.schema.equals(schema):
        return rows
    columns = [
        pa.nulls(rows.num_rows, field.type)
        if field.nullable and field.name not in rows.schema.names
        else rows.column(field.name)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def upgrade_schema(kind: str, stored: pa.Schema) -> pa.Schema:
    """Returns the schema of a stored dataset, plus the nullable columns that were later added to this kind."""
    current = {
        "manifest": MANIFEST_SCHEMA,
        "features": features_schema(1, "float16"),
        "captions": captions_schema(),
        "embeddings": embeddings_schema(1),
        "duplicates": DUPLICATES_SCHEMA,
    }[kind]
    known = [
        stored.field(each.name) if each.name in stored.names else each
        for each in current
        if each.nullable or each.name in stored.names
    ]
    return pa.schema([*known, *(each for each in stored if each.name not in current.names)])


def failure_row(row: Mapping[str, Any], error: ImageError) -> dict[str, str | None]:
    """Returns the failure of an image with this input row."""
    return {
        "image_id": row["image_id"],
        "uri": row["uri"],
        "version": row.get("version"),
        "stage": error.stage,
        "error": error.reason,
        "message": str(error),
    }


def features_schema(size: int, dtype: str) -> pa.Schema:
    """Returns the columns of a manifest and `features`, a vector of `size` float16 or float32 values."""
    vector = pa.list_({"float16": pa.float16(), "float32": pa.float32()}[dtype], size)
    return pa.schema([*MANIFEST_SCHEMA, *_IMAGE_FILE_FIELDS, pa.field("features", vector, nullable=False)])


def captions_schema(positions: int | None = None, has_scores: bool = False) -> pa.Schema:
    """Returns the schema of a captions dataset.

    Args:
        positions: number of positions of the feature map, for the column `attention`. If None, the column is omitted.
        has_scores: adds `image_text_score` to the columns and to the candidates.
    """
    scores = [pa.field("image_text_score", pa.float32())] if has_scores else []
    candidate = pa.struct([pa.field("caption", pa.string()), pa.field("log_prob", pa.float32()), *scores])
    attention = {} if positions is None else {"attention": pa.list_(pa.list_(pa.float16(), positions))}
    captions = _schema(
        "caption",
        log_prob=pa.float32(),
        tokens=pa.int32(),
        candidates=pa.list_(candidate),
        **attention,
    )
    return pa.schema(
        [*_schema("image_id", "uri"), _VERSION, *_schema("split"), *_IMAGE_FILE_FIELDS, *captions, *scores]
    )


def embeddings_schema(size: int) -> pa.Schema:
    """Returns the schema of an embeddings dataset: unit vectors in the joint space of images and captions."""
    vector = _schema(embedding=pa.list_(pa.float16(), size))
    return pa.schema([*_schema("image_id", "uri"), _VERSION, *_IMAGE_FILE_FIELDS, *vector])
