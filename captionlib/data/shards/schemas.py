"""The rows of every dataset that captionlib writes, as explicit, versioned Arrow schemas."""

import pyarrow as pa

__all__ = [
    "CANDIDATE_TYPE",
    "COLUMN_DESCRIPTIONS",
    "FAILURES_SCHEMA",
    "MANIFEST_SCHEMA",
    "SCHEMA_VERSION",
    "captions_schema",
    "embeddings_schema",
    "feature_size",
    "features_schema",
]

SCHEMA_VERSION = 1

# The reference documentation of the columns.
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

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
    ]
)

FAILURES_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
    ]
)

CANDIDATE_TYPE = pa.struct([pa.field("caption", pa.string()), pa.field("log_prob", pa.float32())])


def features_schema(size: int, dtype: str) -> pa.Schema:
    """The manifest's columns and `features`, a vector of `size` numbers of `dtype` (float16 or float32)."""
    vector = pa.list_(_float(dtype), size)
    return MANIFEST_SCHEMA.append(pa.field("features", vector, nullable=False))


def captions_schema(positions: int | None = None) -> pa.Schema:
    """What the captioner says of each image, the best candidate spread into columns of its own.

    Args:
        positions: of the map that it looked at: a column `attention` has a vector a token of the best candidate, END
            last, each adding up to 1. None is without.
    """
    schema = pa.schema(
        [
            MANIFEST_SCHEMA.field("image_id"),
            MANIFEST_SCHEMA.field("uri"),
            MANIFEST_SCHEMA.field("split"),
            pa.field("caption", pa.string(), nullable=False),
            pa.field("log_prob", pa.float32(), nullable=False),
            pa.field("tokens", pa.int32(), nullable=False),
            pa.field("candidates", pa.list_(CANDIDATE_TYPE), nullable=False),
        ]
    )
    if positions is None:
        return schema
    return schema.append(pa.field("attention", pa.list_(pa.list_(pa.float16(), positions)), nullable=False))


def embeddings_schema(size: int) -> pa.Schema:
    """Unit vectors of `size` numbers in the space that images and sentences share."""
    vector = pa.list_(pa.float16(), size)
    return pa.schema(
        [MANIFEST_SCHEMA.field("image_id"), MANIFEST_SCHEMA.field("uri"), pa.field("embedding", vector, nullable=False)]
    )


def feature_size(schema: pa.Schema) -> int:
    """How many numbers the `features` column of `schema` holds a row."""
    size: int = schema.field("features").type.list_size
    return size


def _float(dtype: str) -> pa.DataType:
    return {"float16": pa.float16(), "float32": pa.float32()}[dtype]
