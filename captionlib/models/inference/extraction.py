"""Images of a manifest to feature vectors: decoding overlapped with the encoder on full batches."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from captionlib.config import describe_differences
from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.images.loading import LoadingConfig, open_loader
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, features_schema
from captionlib.data.shards.stages import ProcessRows, ReportFailure
from captionlib.errors import ConfigError, DatasetError, ImageError
from captionlib.models.encoders.encoder import Encoder, EncoderConfig, Encoding, load_encoder
from captionlib.models.inference.shared_models import cached_per_process

__all__ = ["ExtractionConfig", "FeatureExtraction", "encode_images", "load_shared_encoder"]

Row = dict[str, Any]


@dataclass(frozen=True)
class ExtractionConfig:
    """How images become features.

    Attributes:
        encoder: the network; what the features depend on.
        loading: how images are fetched and decoded.
        batch_size: images a batch.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class FeatureExtraction:
    """The stage from `manifest/` to `features/`.

    Attributes:
        config: how images become features.
        description: of the encoder that the output belongs to; a worker with other weights stops at once.
        device: where the encoder runs.
        threads: that it computes with on a CPU; None as PyTorch chooses.
    """

    config: ExtractionConfig
    description: Mapping[str, Any]
    device: str = "auto"
    threads: int | None = None

    @property
    def columns(self) -> Sequence[str]:
        names: Sequence[str] = MANIFEST_SCHEMA.names
        return names

    @contextmanager
    def open(self) -> Iterator[ProcessRows]:
        """Loads the encoder and starts the decoders; see `Stage.open`."""
        encoder = load_shared_encoder(self.config.encoder, self.device, self.threads, self.description)
        schema = features_schema(encoder.size, self.config.encoder.stored_dtype)
        with open_loader(self.config.loading, encoder.preprocessing) as load:

            def process(rows: Iterator[pa.RecordBatch], fail: ReportFailure) -> Iterator[tuple[pa.RecordBatch, ...]]:
                loaded = load(row for batch in rows for row in batch.to_pylist())
                for kept, features in encode_images(encoder, loaded, self.config.batch_size, fail):
                    yield (_to_rows(kept, features, schema),)

            yield process


def encode_images(
    encoder: Encoder,
    loaded: Iterator[tuple[Row, npt.NDArray[np.uint8] | ImageError]],
    batch_size: int,
    fail: ReportFailure,
) -> Iterator[tuple[list[Row], npt.NDArray[np.floating]]]:
    """Encodes images in full batches; those that could not be had go to `fail`.

    Yields:
        The rows of a batch and their features, `[batch, *encoder.shape]`.
    """
    waiting: deque[tuple[list[Row], Encoding]] = deque()
    for rows, images in _batches(loaded, batch_size, fail):
        waiting.append((rows, encoder.begin(images)))  # the next one, while a GPU computes the one before
        if len(waiting) > 1:
            begun, encoding = waiting.popleft()
            yield begun, encoding()
    for begun, encoding in waiting:
        yield begun, encoding()


def _batches(
    loaded: Iterator[tuple[Row, npt.NDArray[np.uint8] | ImageError]], batch_size: int, fail: ReportFailure
) -> Iterator[tuple[list[Row], npt.NDArray[np.uint8]]]:
    rows: list[Row] = []
    images: list[npt.NDArray[np.uint8]] = []
    for row, image in loaded:
        if isinstance(image, ImageError):
            fail(row["image_id"], row["uri"], image)
            continue
        rows.append(row)
        images.append(image)
        if len(rows) == batch_size:
            yield rows, np.stack(images)
            rows, images = [], []
    if rows:
        yield rows, np.stack(images)


def load_shared_encoder(
    config: EncoderConfig, device: str, threads: int | None, description: Mapping[str, Any] | None = None
) -> Encoder:
    """The process's one encoder of this configuration, however many threads and bundles ask for it.

    Raises:
        DatasetError: it is not the one of `description`: the weights differ between machines.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    encoder = _shared_encoder(config, device)
    if description is not None and encoder.description != description:
        lines = describe_differences(description, encoder.description)
        raise DatasetError(f"the encoder here is not the one this dataset is made with ({'; '.join(lines)})")
    return encoder


@cached_per_process
def _shared_encoder(config: EncoderConfig, device: str) -> Encoder:
    return load_encoder(config, device)


def _to_rows(rows: Sequence[Row], features: npt.NDArray[np.floating], schema: pa.Schema) -> pa.RecordBatch:
    columns = [
        pa.array([row[name] for row in rows], MANIFEST_SCHEMA.field(name).type) for name in MANIFEST_SCHEMA.names
    ]
    return pa.RecordBatch.from_arrays([*columns, numpy_to_vectors(features)], schema=schema)
