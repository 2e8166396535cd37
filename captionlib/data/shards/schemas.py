"""The Arrow schemas of all datasets that captionlib writes."""

import pyarrow as pa

__all__ = [
    "CANDIDATE_TYPE",
    "COLUMN_DESCRIPTIONS",
    "FAILURES_SCHEMA",
    "MANIFEST_SCHEMA",
    "SCHEMA_VERSION",
    "captions_schema",
    "embeddings_schema",
    "features_schema",
]

SCHEMA_VERSION = 1

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


def features_schema(size: int, dtype: str) -> pa.Schema:
    """Returns the schema of a features dataset: the manifest's columns and `features`.

    Args:
        size: the number of elements of a feature vector.
        dtype: float16 or float32.
    """
    vector = pa.list_({"float16": pa.float16(), "float32": pa.float32()}[dtype], size)
    return MANIFEST_SCHEMA.append(pa.field("features", vector, nullable=False))


def captions_schema(positions: int | None = None) -> pa.Schema:
    """Returns the schema of a captions dataset. The best candidate also has columns of its own.

    Args:
        positions: the number of positions of the attention maps. Adds a column `attention` with one vector of attention
            weights per token of the best candidate, the end token last; each vector adds up to 1. None omits it.
    """
    schema = pa.schema(
        [
            *(MANIFEST_SCHEMA.field(name) for name in ("image_id", "uri", "split")),
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
    """Returns the schema of an embeddings dataset: unit vectors of `size` elements in the joint embedding space."""
    vector = pa.list_(pa.float16(), size)
    columns = [MANIFEST_SCHEMA.field(name) for name in ("image_id", "uri")]
    return pa.schema([*columns, pa.field("embedding", vector, nullable=False)])
