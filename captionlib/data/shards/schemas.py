"""Arrow schemas of the datasets: manifest (images and reference captions), features, captions and embeddings."""

import pyarrow as pa

from captionlib.errors import ImageError

__all__ = [
    "COLUMN_DESCRIPTIONS",
    "FAILURES_SCHEMA",
    "MANIFEST_SCHEMA",
    "SCHEMA_VERSION",
    "captions_schema",
    "embeddings_schema",
    "failure_row",
    "features_schema",
]

SCHEMA_VERSION = 1


def _schema(*text: str, **columns: pa.DataType) -> pa.Schema:
    """Returns a schema with the given text columns and then the other columns, none of which may contain nulls."""
    types = dict.fromkeys(text, pa.string()) | columns
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])


MANIFEST_SCHEMA = _schema("image_id", "uri", "split", captions=pa.list_(pa.string()))
FAILURES_SCHEMA = _schema("image_id", "uri", "stage", "error", "message")
# Shown in the reference documentation.
COLUMN_DESCRIPTIONS = {
    "image_id": "Id of the image, unique within a dataset.",
    "uri": "Path or URL of the image.",
    "split": "Split that the image belongs to, such as train, val or test; empty if unknown.",
    "captions": "Reference captions, written by humans.",
    "features": "Image features from the encoder: a vector, or a feature map flattened position by position.",
    "caption": "Best caption.",
    "log_prob": "Natural logarithm of the probability of the caption, summed over its tokens.",
    "tokens": "Number of tokens in the caption, including the end token.",
    "candidates": "Candidate captions for the image, best first.",
    "attention": "Attention weights of each token over the positions of the feature map; each row sums to 1.",
    "embedding": "Embedding of the image: a unit vector in the joint space of images and captions.",
    "stage": "Stage that failed: fetch or decode.",
    "error": "Category under which the failure is counted, such as NotFound.",
    "message": "Description of the error.",
}


def failure_row(image_id: str, uri: str, error: ImageError) -> dict[str, str]:
    """Returns the row of the failures table for an image that could not be read."""
    return {"image_id": image_id, "uri": uri, "stage": error.stage, "error": error.reason, "message": str(error)}


def features_schema(size: int, dtype: str) -> pa.Schema:
    """Returns the schema of a features dataset: MANIFEST_SCHEMA plus a vector of `size` float16 or float32 values."""
    vector = pa.list_({"float16": pa.float16(), "float32": pa.float32()}[dtype], size)
    return MANIFEST_SCHEMA.append(pa.field("features", vector, nullable=False))


def captions_schema(positions: int | None = None) -> pa.Schema:
    """Returns the schema of a captions dataset. `caption`, `log_prob` and `tokens` describe the best candidate.

    Args:
        positions: number of positions of the feature map. Adds a column `attention`, which has a vector of attention
            weights for each token of the best candidate, including the end token. If None, the column is omitted.
    """
    attention = {} if positions is None else {"attention": pa.list_(pa.list_(pa.float16(), positions))}
    return _schema(
        *("image_id", "uri", "split", "caption"),
        log_prob=pa.float32(),
        tokens=pa.int32(),
        candidates=pa.list_(pa.struct({"caption": pa.string(), "log_prob": pa.float32()})),
        **attention,
    )


def embeddings_schema(size: int) -> pa.Schema:
    """Returns the schema of an embeddings dataset: unit vectors in the joint space of images and captions."""
    return _schema("image_id", "uri", embedding=pa.list_(pa.float16(), size))
