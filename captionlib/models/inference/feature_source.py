"""Where a model's features come from: the rows of `features/`, or the images of `manifest/` and its own encoder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captionlib.data.arrays import vectors_to_numpy
from captionlib.data.images.loading import LoadingConfig, open_loader
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.stages import ReportFailure
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.extraction import encode_images, load_shared_encoder

__all__ = ["FeatureLoader", "FeatureModel", "open_feature_source", "resolve_encoder"]

Row = dict[str, Any]

FeatureLoader = Callable[
    [Iterator[pa.RecordBatch], ReportFailure], Iterator[tuple[list[Row], npt.NDArray[np.floating]]]
]
"""Takes rows; gives pieces of them, with all that they had but the features, and the features, `[rows, *shape]`."""


class FeatureModel(Protocol):
    """A model that is at home with the features of one encoder."""

    @property
    def encoder(self) -> Mapping[str, Any]:
        """The description of that encoder."""

    @property
    def encoder_weights(self) -> str | None:
        """Its weights file, where the model brings it."""

    def require_encoder(self, description: Mapping[str, Any]) -> None:
        """Raises CheckpointError where `description` is of another one."""


def resolve_encoder(
    source: ShardedDataset, model: FeatureModel, weights: str | None, device: str, threads: int | None
) -> EncoderConfig | None:
    """The encoder that has to run first, checked; None where the source has features, which are checked instead.

    Args:
        source: a features dataset or a manifest.
        model: what takes the features.
        weights: the encoder's weights file, where the model learned from features of such a file and does not bring it.
        device: where the encoder is to run.
        threads: that it computes with on a CPU; None as PyTorch chooses.

    Raises:
        CheckpointError: the features, or the encoder with these weights, are not the model's.
        ConfigError: weights are missing, or given where nothing is encoded.
        DatasetError: the source is something else.
    """
    if source.kind == "features":
        if weights is not None:
            raise ConfigError(f"--weights is for encoding images; {source.folder.uri} already holds features")
        model.require_encoder(source.config["encoder"])
        return None
    if source.kind != "manifest":
        raise DatasetError(f"{source.folder.uri}: expected a dataset of kind features or manifest, got {source.kind}")
    config = EncoderConfig.from_description(model.encoder, weights or model.encoder_weights).with_absolute_weights()
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
    """Loads the encoder and starts the decoders of images, where rows do not have features already.

    Args:
        encoder: makes features of images; None where the rows have features.
        description: of the encoder that is expected; a worker with other weights stops at once.
        loading: how images are fetched and decoded.
        batch_size: images a batch of the encoder.
        device: where the encoder runs.
        threads: that it computes with on a CPU; None as PyTorch chooses.
    """
    if encoder is None:
        yield lambda rows, _fail: split_features(rows, description["shape"])
        return
    loaded_encoder = load_shared_encoder(encoder, device, threads, description)
    with open_loader(loading, loaded_encoder.preprocessing) as load:

        def encode(
            rows: Iterator[pa.RecordBatch], fail: ReportFailure
        ) -> Iterator[tuple[list[Row], npt.NDArray[np.floating]]]:
            loaded = load(row for batch in rows for row in batch.to_pylist())
            return encode_images(loaded_encoder, loaded, batch_size, fail)

        yield encode


def split_features(
    rows: Iterator[pa.RecordBatch], shape: Sequence[int]
) -> Iterator[tuple[list[Row], npt.NDArray[np.floating]]]:
    """Splits batches of `features/` into plain columns and the features, `[rows, *shape]`."""
    for batch in rows:
        features = vectors_to_numpy(batch["features"], shape)
        yield batch.drop_columns(["features"]).to_pylist(), features
