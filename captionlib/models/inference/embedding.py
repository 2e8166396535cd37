"""Embeds images as unit vectors with a ranker, a dual encoder for image-text retrieval."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import PositiveInt

from captionlib.config import configclass
from captionlib.data.images.loading import LoadingConfig
from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.sampling import StageInput
from captionlib.data.shards.schemas import embeddings_schema
from captionlib.data.shards.stages import ProcessRows
from captionlib.models.families.model import InputTransform
from captionlib.models.families.ranker import RankingModel, open_ranker
from captionlib.models.inference.extraction import build_vector_rows
from captionlib.models.inference.model_inputs import open_input_loader
from captionlib.models.inference.shared_models import CheckpointCache, CheckpointVersion

__all__ = ["SHARED_RANKERS", "EmbeddingConfig", "ImageEmbedding", "build_embedding_rows", "create_embeddings_dataset"]

SHARED_RANKERS: CheckpointCache[RankingModel] = CheckpointCache(open_ranker)

Row = dict[str, Any]


@configclass
class EmbeddingConfig:
    """Configuration of image embedding. It applies only if the input is images, not features.

    Attributes:
        loading: how to fetch and decode images.
        encoder_batch_size: images per batch of the encoder.
    """

    loading: LoadingConfig = field(default_factory=LoadingConfig)
    encoder_batch_size: PositiveInt = 32


@dataclass(frozen=True)
class ImageEmbedding:
    """Pipeline stage from a features dataset or a manifest (list of images) to an embeddings dataset."""

    config: EmbeddingConfig
    ranker: CheckpointVersion
    input_transform: InputTransform | None = None  # None if the dataset contains features
    device: str = "auto"
    threads: int | None = None  # CPU threads of the models; None for PyTorch's default

    @property
    def columns(self) -> Sequence[str]:
        names = ["image_id", "uri", "version"]
        return names if self.input_transform else [*names, "width", "height", "content_hash", "features"]

    @contextmanager
    def open(self) -> Iterator[ProcessRows]:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        ranker = SHARED_RANKERS.get(self.ranker, self.device)
        config = self.config
        with open_input_loader(
            [self.input_transform], [ranker], config.loading, config.encoder_batch_size, self.device, self.threads
        ) as load_features:
            yield lambda batches, report_failure: (
                (build_embedding_rows(rows, ranker.encode_images(images)),)
                for rows, (images,) in load_features(batches, report_failure)
            )


def create_embeddings_dataset(
    folder: str | os.PathLike[str], stage_input: StageInput, ranker: RankingModel, overwrite: bool
) -> ShardedDataset:
    return create_dataset(
        folder,
        "embeddings",
        embeddings_schema(ranker.size),
        config={"ranker": ranker.fingerprint, "encoder": ranker.encoder, **stage_input.config},
        **stage_input.input_arguments,
        overwrite=overwrite,
    )


def build_embedding_rows(rows: Sequence[Row], vectors: npt.NDArray[np.float32]) -> pa.RecordBatch:
    """Returns rows of an embeddings dataset. `vectors` is `[images, size]`."""
    return build_vector_rows(rows, vectors.astype(np.float16), embeddings_schema(vectors.shape[1]))
