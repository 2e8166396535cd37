"""The Arrow schemas of all datasets that captionlib writes."""

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
    """Returns a schema of text columns and other columns, all without nulls."""
    types = dict.fromkeys(text, pa.string()) | columns
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])


MANIFEST_SCHEMA = _schema("image_id", "uri", "split", captions=pa.list_(pa.string()))
FAILURES_SCHEMA = _schema("image_id", "uri", "stage", "error", "message")
# Shown in the reference documentation.
COLUMN_DESCRIPTIONS = {
    "image_id": "Identifies the image; unique in a dataset.",
    "uri": "Path or address of the image.",
    "split": "Split that the image belongs to, such as train, val or test; empty if unknown.",
    "captions": "Reference captions, written by humans.",
    "features": "Features that the encoder computed: a vector, or a map whose positions are concatenated.",
    "caption": "Best caption.",
    "log_prob": "Natural logarithm of the probability of the caption: the sum over its tokens.",
    "tokens": "Number of tokens of the caption, including the end token.",
    "candidates": "All captions found for the image, best first.",
    "attention": "Attention weights of each token over the positions of the feature map; each row sums to 1.",
    "embedding": "Embedding of the image: a unit vector in the space that images and sentences share.",
    "stage": "Stage that failed: fetch or decode.",
    "error": "Class of the error; failures are counted by it.",
    "message": "What went wrong.",
}


def failure_row(image_id: str, uri: str, error: ImageError) -> dict[str, str]:
    """Returns the row of a failures table that describes an image that failed."""
    return {"image_id": image_id, "uri": uri, "stage": error.stage, "error": error.reason, "message": str(error)}


def features_schema(size: int, dtype: str) -> pa.Schema:
    """Returns the schema of a features dataset: the manifest's columns, and vectors of `size` float16 or float32."""
    vector = pa.list_({"float16": pa.float16(), "float32": pa.float32()}[dtype], size)
    return MANIFEST_SCHEMA.append(pa.field("features", vector, nullable=False))


def captions_schema(positions: int | None = None) -> pa.Schema:
    """Returns the schema of a captions dataset. The best candidate also has columns of its own.

    Args:
        positions: the number of positions of the attention maps. Adds a column `attention` with one vector of attention
            weights per token of the best candidate, the end token last; each vector adds up to 1. None omits it.
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
    """Returns the schema of an embeddings dataset: unit vectors of `size` elements in the joint embedding space."""
    return _schema("image_id", "uri", embedding=pa.list_(pa.float16(), size))
