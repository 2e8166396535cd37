"""Small captions and embeddings datasets whose vectors count the words of the captions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import captions_schema, embeddings_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DecodeError
from captionlib.models.encoders.encoder import EncoderConfig

from .conftest import rows

WORDS = ["dog", "cat", "frisbee", "beach", "horse", "snow", "train", "pizza"]
SIZE = len(WORDS)

Row = tuple[str, str, float]


class WordRanker:
    """A ranker with one axis per word: the vector of a sentence counts its words."""

    fingerprint = "ranker-of-words"
    encoder: Mapping[str, Any] = {}

    def find_input_transform(self, weights: str | None) -> EncoderConfig:
        return EncoderConfig.from_description(self.encoder, weights)

    def require_encoder(self, description: Mapping[str, Any]) -> None:
        assert description == self.encoder

    def has_known_word(self, sentence: str) -> bool:
        return any(word in sentence.lower() for word in WORDS)

    def encode_sentences(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        counts = np.array([[sentence.lower().split().count(word) for word in WORDS] for sentence in sentences])
        vectors = counts.astype(np.float32) + 0.01
        unit: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    def encode_images(self, features: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        vectors = np.abs(features[:, :SIZE]).astype(np.float32) + 0.01
        unit: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit


def make_rows(count: int, start: int = 0) -> list[Row]:
    """Returns captions of two words each, with every pair equally often."""
    pairs = [(a, b) for a in WORDS for b in WORDS if a != b]
    return [
        (f"im{number}", f"a {pairs[number % len(pairs)][0]} and a {pairs[number % len(pairs)][1]}", -1.0 - number % 50)
        for number in range(start, start + count)
    ]


def write_captions_dataset(
    address: str,
    shards: Mapping[int, Sequence[Row]],
    total: int,
    failed: Mapping[int, Sequence[str]] | None = None,
    existing: ShardedDataset | None = None,
) -> ShardedDataset:
    """Writes some of the `total` shards of a captions dataset, which may exist."""
    config, manifest_id = (existing.config, existing.manifest_id) if existing else ({"input": "images"}, None)
    dataset = create_dataset(
        address, "captions", captions_schema(), config=config, shards=total, manifest_id=manifest_id
    )
    for shard, captions in shards.items():
        failures = (failed or {}).get(shard, [])
        with write_shard(dataset, shard, len(captions) + len(failures)) as writer:
            if captions:
                writer.write(rows(*captions))
            for name in failures:
                writer.write_failure(
                    {"image_id": name, "uri": f"images/{name}.jpg"}, DecodeError("Truncated", "ends early")
                )
    return dataset


def write_embeddings_dataset(
    address: str,
    shards: Mapping[int, Sequence[Row]],
    total: int,
    failed: Mapping[int, Sequence[str]] | None = None,
    ranker: str = WordRanker.fingerprint,
) -> ShardedDataset:
    """Writes the embeddings of the same images, in reverse order."""
    schema = embeddings_schema(SIZE)
    config = {"input": "images", "ranker": ranker}
    dataset = create_dataset(address, "embeddings", schema, config=config, shards=total)
    for shard, captions in shards.items():
        failures = (failed or {}).get(shard, [])
        with write_shard(dataset, shard, len(captions) + len(failures)) as writer:
            if captions:
                backwards = list(reversed(captions))
                vectors = WordRanker().encode_sentences([caption for _, caption, _ in backwards])
                values = [
                    {"image_id": name, "uri": f"images/{name}.jpg", "embedding": vector}
                    for (name, _, _), vector in zip(backwards, vectors.astype(np.float16), strict=True)
                ]
                writer.write(pa.RecordBatch.from_pylist(values, schema=schema))
            for name in failures:
                writer.write_failure(
                    {"image_id": name, "uri": f"images/{name}.jpg"}, DecodeError("Truncated", "ends early")
                )
    return dataset
