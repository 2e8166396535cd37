"""Reads input features from a features dataset, or computes them for a manifest (dataset of image addresses)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captionlib.data.arrays import vectors_to_numpy
from captionlib.data.images.loading import LoadingConfig, open_loader
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.stages import ReportFailure
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.checkpoints.checkpoint import LoadedModel
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.extraction import encode_images, load_shared_encoder

__all__ = ["EncodedRows", "FeatureLoader", "open_feature_source", "resolve_encoder"]

EncodedRows = Iterator[tuple[list[dict[str, Any]], npt.NDArray[np.floating]]]
FeatureLoader = Callable[[Iterator[pa.RecordBatch], ReportFailure], EncodedRows]
"""Function from batches of a dataset to pairs of rows without features, and their features, `[rows, *shape]`."""


def resolve_encoder(
    source: ShardedDataset, model: LoadedModel[Any, Any], weights: str | None, device: str, threads: int | None
) -> EncoderConfig | None:
    """Returns the encoder that must run before a model, or None if `source` contains features already.

    `weights` is the path of the encoder's weights file. It is required if the encoder was loaded from a file that the
    model's checkpoint does not contain. If `threads` is None, PyTorch chooses the number of threads.

    Raises:
        CheckpointError: the encoder, or the features' encoder, differs from the one that the model was trained with.
        ConfigError: `weights` are required but None, or specified although no images are encoded.
        DatasetError: the source is neither a features dataset nor a manifest.
    """
    if source.kind == "features":
        if weights is not None:
            raise ConfigError(f"--weights is for encoding images, but {source.folder.uri} contains features; omit it")
        model.require_encoder(source.config["encoder"])
        return None
    if source.kind != "manifest":
        raise DatasetError(f"{source.folder.uri}: expected a dataset of kind features or manifest, got {source.kind}")
    config = EncoderConfig.from_description(model.encoder, weights or model.encoder_weights).resolve_weights_path()
    model.require_encoder(load_shared_encoder(config, device, threads).description)
    return config


@contextmanager
def open_feature_source(
    encoder: EncoderConfig | None,
    description: Mapping[str, Any],
    loading: LoadingConfig,
    batch_size: int,
    device: str,
    threads: int | None,
) -> Iterator[FeatureLoader]:
    """Opens a loader that encodes images or, if `encoder` is None, reads the column `features`.

    Workers whose encoder differs from `description` fail. If `threads` is None, PyTorch chooses the number of threads.
    """
    if encoder is None:
        yield lambda batches, _fail: _split_features(batches, description["shape"])
        return
    shared_encoder = load_shared_encoder(encoder, device, threads, description)
    with open_loader(loading, shared_encoder.preprocessing) as load:
        yield lambda batches, fail: encode_images(
            shared_encoder, load(row for batch in batches for row in batch.to_pylist()), batch_size, fail
        )


def _split_features(batches: Iterator[pa.RecordBatch], shape: Sequence[int]) -> EncodedRows:
    for batch in batches:
        yield batch.drop_columns(["features"]).to_pylist(), vectors_to_numpy(batch["features"], shape)
