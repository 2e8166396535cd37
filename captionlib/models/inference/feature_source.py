"""Provides the input of models: reads features, or computes them for a manifest (list of images)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from captionlib.data.arrays import vectors_to_numpy
from captionlib.data.images.loading import LoadingConfig, open_loader
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.stages import ReportFailure
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.families.encoder import ImageEncoder
from captionlib.models.families.model import Arrays, ImageModel, ImageSource
from captionlib.models.inference.extraction import EncodedRows, PixelReader, encode_images, load_shared_encoder

__all__ = ["FeatureLoader", "find_model_input", "open_feature_source"]

FeatureLoader = Callable[[Iterator[pa.RecordBatch], ReportFailure], EncodedRows]
"""Function from batches of a dataset to rows without features, and the input of each model for these rows."""


def find_model_input(
    source: ShardedDataset, model: ImageModel, weights: str | None, device: str, threads: int | None
) -> ImageSource | None:
    """Returns how the images of a manifest become the input of a model, or None if `source` contains features.

    `weights` is the path of the encoder's weights file, if the user specified it. If `threads` is None, PyTorch chooses
    the number of threads.

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
    model_input = model.find_source(weights)
    if isinstance(model_input, EncoderConfig):
        model.require_encoder(load_shared_encoder(model_input, device, threads).description)
    return model_input


@contextmanager
def open_feature_source(
    inputs: Sequence[ImageSource | None],
    models: Sequence[ImageModel],
    loading: LoadingConfig,
    batch_size: int,
    device: str,
    threads: int | None,
) -> Iterator[FeatureLoader]:
    """Opens a loader of the input of one or more models.

    Workers whose encoder differs from that of a model fail.

    Args:
        inputs: how images become the input of each model, from `find_model_input`.
        models: the models.
        loading: how images are fetched and decoded.
        batch_size: images per batch of an encoder.
        device: device of the encoders.
        threads: CPU threads of the encoders; if None, PyTorch's default.
    """
    if None in inputs:
        shape = models[0].encoder["shape"]
        yield lambda batches, _fail: _split_features(batches, shape, len(models))
        return
    descriptions: list[Mapping[str, Any]] = []
    encoders: list[ImageEncoder | PixelReader] = []
    positions = []  # of the encoder of each model
    for model_input, model in zip(inputs, models, strict=True):
        if model.encoder not in descriptions:
            descriptions.append(model.encoder)
            if isinstance(model_input, EncoderConfig):
                encoders.append(load_shared_encoder(model_input, device, threads, model.encoder))
            elif model_input is not None:
                encoders.append(PixelReader(model_input))
        positions.append(descriptions.index(model.encoder))

    def encode(batches: Iterator[pa.RecordBatch], fail: ReportFailure) -> EncodedRows:
        rows = (row for batch in batches for row in batch.to_pylist())
        for encoded, features in encode_images(encoders, load(rows), batch_size, fail):
            yield encoded, [features[position] for position in positions]

    with open_loader(loading, *(encoder.preprocessing for encoder in encoders)) as load:
        yield encode


def _split_features(batches: Iterator[pa.RecordBatch], shape: Sequence[int], copies: int) -> EncodedRows:
    for batch in batches:
        features: Arrays = vectors_to_numpy(batch["features"], shape)
        yield batch.drop_columns(["features"]).to_pylist(), [features] * copies
