"""Embeddings by the shard: images to unit vectors of the space that a ranker has learned."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.images.loading import LoadingConfig
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, embeddings_schema
from captionlib.data.shards.stages import ProcessRows, ReportFailure
from captionlib.errors import CheckpointError, ConfigError, ImageError
from captionlib.models.checkpoints.checkpoint import LoadedRanker, load_ranker
from captionlib.models.devices import resolve_device
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.feature_source import open_feature_source
from captionlib.models.inference.shared_models import cached_per_process

__all__ = [
    "EmbeddingConfig",
    "ImageEmbedding",
    "PinnedRanker",
    "build_embedding_rows",
    "describe_embeddings",
    "embed_single_images",
]

Row = dict[str, Any]


@dataclass(frozen=True)
class EmbeddingConfig:
    """How images are embedded, where they are not features already.

    Attributes:
        loading: how images are fetched and decoded.
        encoder_batch_size: images a batch of the encoder.
    """

    loading: LoadingConfig = field(default_factory=LoadingConfig)
    encoder_batch_size: int = 32

    def __post_init__(self) -> None:
        if self.encoder_batch_size < 1:
            raise ConfigError(f"encoder_batch_size: expected at least 1, got {self.encoder_batch_size}")


@dataclass(frozen=True)
class PinnedRanker:
    """A ranker as it travels to workers.

    Attributes:
        checkpoint: its folder.
        fingerprint: of the ranker that the output belongs to; a worker that finds another stops at once.
    """

    checkpoint: str
    fingerprint: str

    def open(self, device: str) -> LoadedRanker:
        """The process's one ranker of this kind, however many threads and bundles ask for it.

        Raises:
            CheckpointError: it is another one by now.
        """
        return _shared_ranker(self, str(resolve_device(device)))


@cached_per_process
def _shared_ranker(folder: PinnedRanker, device: str) -> LoadedRanker:
    ranker = load_ranker(folder.checkpoint, device)
    if ranker.fingerprint != folder.fingerprint:
        raise CheckpointError(
            f"{folder.checkpoint}: expected ranker {folder.fingerprint}, got {ranker.fingerprint}; "
            "the checkpoint was replaced while the embeddings were made: start again with --overwrite"
        )
    return ranker


@dataclass(frozen=True)
class ImageEmbedding:
    """The stage from `features/` or `manifest/` to `embeddings/`.

    Attributes:
        config: how images become features.
        ranker: the model.
        encoder: makes features of images; None where the rows have features.
        device: where the models run.
        threads: that they compute with on a CPU; None as PyTorch chooses.
    """

    config: EmbeddingConfig
    ranker: PinnedRanker
    encoder: EncoderConfig | None = None
    device: str = "auto"
    threads: int | None = None

    @property
    def columns(self) -> Sequence[str]:
        return ["image_id", "uri", *([] if self.encoder else ["features"])]

    @contextmanager
    def open(self) -> Iterator[ProcessRows]:
        """Loads the models; see `Stage.open`."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        ranker = self.ranker.open(self.device)
        config = self.config
        with open_feature_source(
            self.encoder, ranker.encoder, config.loading, config.encoder_batch_size, self.device, self.threads
        ) as load_features:

            def process(rows: Iterator[pa.RecordBatch], fail: ReportFailure) -> Iterator[tuple[pa.RecordBatch, ...]]:
                for some, features in load_features(rows, fail):
                    yield (build_embedding_rows(some, features, ranker),)

            yield process


def describe_embeddings(source: ShardedDataset, ranker: LoadedRanker) -> dict[str, Any]:
    """All that the rows of `embeddings/` depend on, whichever command writes them."""
    return {"input": source.fingerprint, "ranker": ranker.fingerprint, "encoder": ranker.encoder}


def build_embedding_rows(
    rows: Sequence[Row], features: npt.NDArray[np.floating], ranker: LoadedRanker
) -> pa.RecordBatch:
    """Rows of `embeddings/`."""
    schema = embeddings_schema(ranker.size)
    vectors = numpy_to_vectors(ranker.encode_features(features).astype(np.float16))
    columns = [pa.array([row[name] for row in rows], schema.field(name).type) for name in ("image_id", "uri")]
    return pa.RecordBatch.from_arrays([*columns, vectors], schema=schema)


def embed_single_images(
    uris: Sequence[str],
    checkpoint: str,
    config: EmbeddingConfig,
    *,
    weights: str | None = None,
    device: str = "auto",
) -> tuple[list[str], npt.NDArray[np.float32], list[tuple[str, ImageError]]]:
    """Embeds single images, outside of any dataset.

    Args:
        uris: paths or addresses.
        checkpoint: the ranker's folder.
        config: how images become features.
        weights: the encoder's weights file, where the ranker learned from features of such a file.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        The uris of the images that could be had, in the order given; their unit vectors, `[images, size]`; and what
        could not be had, with the reason.
    """
    ranker = load_ranker(checkpoint, str(resolve_device(device)))
    rows = pa.RecordBatch.from_pylist(
        [{"image_id": uri, "uri": uri, "split": "", "captions": []} for uri in uris], schema=MANIFEST_SCHEMA
    )
    kept: list[str] = []
    vectors = [np.empty((0, ranker.size), np.float32)]
    failures: list[tuple[str, ImageError]] = []
    encoder = EncoderConfig.from_description(ranker.encoder, weights)
    with open_feature_source(
        encoder, ranker.encoder, config.loading, config.encoder_batch_size, device, None
    ) as load_features:
        for some, features in load_features(iter([rows]), lambda _id, uri, error: failures.append((uri, error))):
            kept.extend(row["uri"] for row in some)
            vectors.append(ranker.encode_features(features))
    return kept, np.concatenate(vectors), failures
