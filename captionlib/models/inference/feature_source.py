"""The features that a model takes as input: read from `features/`, or computed from the images of `manifest/`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captionlib.data.arrays import vectors_to_numpy
from captionlib.data.images.loading import LoadingConfig, open_loader
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.stages import ReportFailure
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.extraction import encode_images, load_shared_encoder

__all__ = ["FeatureLoader", "FeatureModel", "build_manifest_rows", "open_feature_source", "resolve_encoder"]

Row = dict[str, Any]

FeatureLoader = Callable[
    [Iterator[pa.RecordBatch], ReportFailure], Iterator[tuple[list[Row], npt.NDArray[np.floating]]]
]
"""Takes rows of a dataset; yields batches of rows without features, and their features, `[rows, *shape]`."""


class FeatureModel(Protocol):
    """A model that was trained on the features of an encoder."""

    @property
    def encoder(self) -> Mapping[str, Any]:
        """Description of the encoder."""

    @property
    def encoder_weights(self) -> str | None:
        """Path of the encoder's weights file, if the model's checkpoint contains it."""

    def require_encoder(self, description: Mapping[str, Any]) -> None:
        """Raises CheckpointError if `description` is of another encoder."""


def resolve_encoder(
    source: ShardedDataset, model: FeatureModel, weights: str | None, device: str, threads: int | None
) -> EncoderConfig | None:
    """Returns the encoder that must run before a model, and checks that it is the model's encoder.

    Args:
        source: a features dataset or a manifest.
        model: the model that takes the features.
        weights: path of the encoder's weights file; required if the encoder was loaded from a file that the model's
            checkpoint does not contain.
        device: device of the encoder.
        threads: CPU threads of the encoder; None is PyTorch's default.

    Returns:
        The encoder's configuration; None if `source` contains features already.

    Raises:
        CheckpointError: the encoder, or the encoder of the features, is not the model's.
        ConfigError: `weights` are required, or given although nothing is encoded.
        DatasetError: the source is neither a features dataset nor a manifest.
    """
    if source.kind == "features":
        if weights is not None:
            raise ConfigError(f"--weights is for encoding images, but {source.folder.uri} contains features; omit it")
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
    """Opens a source of features: an encoder and its image decoders, or the features column of the rows.

    Args:
        encoder: encodes the images; None if the rows contain features.
        description: description of the expected encoder; workers with another encoder fail.
        loading: how images are fetched and decoded.
        batch_size: images per batch of the encoder.
        device: device of the encoder.
        threads: CPU threads of the encoder; None is PyTorch's default.
    """
    if encoder is None:
        yield lambda batches, _fail: _split_features(batches, description["shape"])
        return
    shared_encoder = load_shared_encoder(encoder, device, threads, description)
    with open_loader(loading, shared_encoder.preprocessing) as load:

        def encode(
            batches: Iterator[pa.RecordBatch], fail: ReportFailure
        ) -> Iterator[tuple[list[Row], npt.NDArray[np.floating]]]:
            images = load(row for batch in batches for row in batch.to_pylist())
            return encode_images(shared_encoder, images, batch_size, fail)

        yield encode


def build_manifest_rows(uris: Sequence[str]) -> pa.RecordBatch:
    """Returns rows of `manifest/` for images outside of any dataset; each uri is its own image id."""
    rows = [{"image_id": uri, "uri": uri, "split": "", "captions": []} for uri in uris]
    return pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA)


def _split_features(
    batches: Iterator[pa.RecordBatch], shape: Sequence[int]
) -> Iterator[tuple[list[Row], npt.NDArray[np.floating]]]:
    for batch in batches:
        yield batch.drop_columns(["features"]).to_pylist(), vectors_to_numpy(batch["features"], shape)
