"""Provides the input of models: reads features, or loads and encodes the images of a manifest (list of images)."""

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
from captionlib.models.families.model import Arrays, ImageModel, InputTransform
from captionlib.models.inference.extraction import EncodedRows, PixelPassthrough, encode_images, load_shared_encoder

__all__ = ["InputLoader", "choose_input_transform", "open_input_loader"]

InputLoader = Callable[[Iterator[pa.RecordBatch], ReportFailure], EncodedRows]
"""Function from batches of a dataset to their rows, without `features`, and the input of each model."""


def choose_input_transform(
    source: ShardedDataset, model: ImageModel, weights: str | None, device: str, threads: int | None
) -> InputTransform | None:
    """Returns the transform from images of a manifest to the input of a model, or None if `source` contains features.

    `weights` is the path of the encoder's weights file, if the user specified it.

    Raises:
        CheckpointError: the encoder of the images or features differs from the one that the model was trained with.
        ConfigError: `weights` is required but None, or specified although no images are encoded.
        DatasetError: the source is neither a features dataset nor a manifest.
    """
    if source.kind == "features":
        if weights is not None:
            raise ConfigError(
                f"--weights is for encoding images, but {source.folder.uri} contains features; omit --weights"
            )
        model.require_encoder(source.config["encoder"])
        return None
    if source.kind != "manifest":
        raise DatasetError(f"{source.folder.uri}: expected a dataset of kind features or manifest, got {source.kind}")
    input_transform = model.find_input_transform(weights)
    if isinstance(input_transform, EncoderConfig):
        model.require_encoder(load_shared_encoder(input_transform, device, threads).description)
    return input_transform


@contextmanager
def open_input_loader(
    input_transforms: Sequence[InputTransform | None],
    models: Sequence[ImageModel],
    loading: LoadingConfig,
    batch_size: int,
    device: str,
    threads: int | None,
) -> Iterator[InputLoader]:
    """Yields a function that loads the input of one or more models.

    `input_transforms` are results of `choose_input_transform`, one for each model. The other arguments apply if images
    are encoded.

    Raises:
        DatasetError: the encoder that this process (such as a Beam worker) loads differs from the encoder of a model.
    """
    if None in input_transforms:  # the dataset contains features
        shape = models[0].encoder["shape"]
        yield lambda batches, _report_failure: _split_features(batches, shape, len(models))
        return
    descriptions: list[Mapping[str, Any]] = []
    encoders: list[ImageEncoder | PixelPassthrough] = []
    encoder_indices = []  # for each model, the position of its encoder in `encoders`
    for input_transform, model in zip(input_transforms, models, strict=True):
        if model.encoder not in descriptions:
            descriptions.append(model.encoder)
            if isinstance(input_transform, EncoderConfig):
                encoders.append(load_shared_encoder(input_transform, device, threads, model.encoder))
            elif input_transform is not None:
                encoders.append(PixelPassthrough(input_transform))
        encoder_indices.append(descriptions.index(model.encoder))

    def encode(batches: Iterator[pa.RecordBatch], report_failure: ReportFailure) -> EncodedRows:
        rows = (row for batch in batches for row in batch.to_pylist())
        for encoded_rows, features in encode_images(encoders, load(rows), batch_size, report_failure):
            yield encoded_rows, [features[index] for index in encoder_indices]

    with open_loader(loading, *(encoder.preprocessing for encoder in encoders)) as load:
        yield encode


def _split_features(batches: Iterator[pa.RecordBatch], shape: Sequence[int], model_count: int) -> EncodedRows:
    for batch in batches:
        features: Arrays = vectors_to_numpy(batch["features"], shape)
        yield batch.drop_columns(["features"]).to_pylist(), [features] * model_count
