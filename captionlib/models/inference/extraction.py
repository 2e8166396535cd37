"""Encodes the images of a manifest (list of images) while the next images are fetched and decoded."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from cachetools import LRUCache, cached
from pydantic import PositiveInt

from captionlib.config import configclass, describe_differences
from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.images.decoding import Preprocessing, SizeLimit
from captionlib.data.images.loading import LoadedImage, LoadingConfig, open_loader
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, features_schema
from captionlib.data.shards.stages import ProcessRows, ReportFailure
from captionlib.errors import DatasetError, ImageError
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.families.encoder import ImageEncoder, open_encoder
from captionlib.models.families.model import Arrays

__all__ = [
    "EncodedRows",
    "ExtractionConfig",
    "FeatureExtraction",
    "PixelPassthrough",
    "build_vector_rows",
    "encode_images",
    "load_shared_encoder",
]

Row = dict[str, Any]

EncodedRows = Iterator[tuple[list[Row], list[Arrays]]]
"""Yields the rows of a batch, and their features from each of one or more encoders."""


@configclass
class ExtractionConfig:
    """Configuration of feature extraction.

    Attributes:
        encoder: the encoder, which determines the features.
        loading: how to fetch and decode images.
        batch_size: images per batch of the encoder.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    batch_size: PositiveInt = 32


@dataclass(frozen=True)
class FeatureExtraction:
    """Pipeline stage from a manifest to a features dataset."""

    config: ExtractionConfig
    description: Mapping[str, Any]  # expected `ImageEncoder.description`; a worker fails if its encoder differs
    device: str = "auto"
    threads: int | None = None  # CPU threads of the encoder; None for PyTorch's default

    @property
    def columns(self) -> Sequence[str]:
        return list(MANIFEST_SCHEMA.names)

    @contextmanager
    def open(self) -> Iterator[ProcessRows]:
        encoder = load_shared_encoder(self.config.encoder, self.device, self.threads, self.description)
        schema = features_schema(math.prod(encoder.shape), self.config.encoder.stored_dtype)
        with open_loader(self.config.loading, encoder.preprocessing) as load:

            def process(
                batches: Iterator[pa.RecordBatch], report_failure: ReportFailure
            ) -> Iterator[tuple[pa.RecordBatch, ...]]:
                images = load(row for batch in batches for row in batch.to_pylist())
                for rows, (features,) in encode_images([encoder], images, self.config.batch_size, report_failure):
                    yield (build_vector_rows(rows, np.asarray(features), schema),)

            yield process


def build_vector_rows(rows: Sequence[Row], vectors: npt.NDArray[np.floating], schema: pa.Schema) -> pa.RecordBatch:
    """Returns rows of a dataset. The last column of `schema` contains the vectors, and `rows` the other columns."""
    columns = [pa.array([row.get(each.name) for row in rows], each.type) for each in list(schema)[:-1]]
    return pa.RecordBatch.from_arrays([*columns, numpy_to_vectors(vectors)], schema=schema)


class PixelPassthrough:
    """The encoder for models whose input is pixels. The features of an image are its pixels."""

    def __init__(self, preprocessing: Preprocessing | SizeLimit) -> None:
        self.preprocessing = preprocessing

    def encode_async(self, images: Sequence[npt.NDArray[np.uint8]]) -> Callable[[], Arrays]:
        return lambda: images


def encode_images(
    encoders: Sequence[ImageEncoder | PixelPassthrough],
    images: Iterator[tuple[Row, LoadedImage | ImageError]],
    batch_size: int,
    report_failure: ReportFailure,
) -> EncodedRows:
    """Encodes images in batches. Images that could not be loaded are reported and left out.

    Each image has one array of pixels per encoder, in the order of `encoders`.
    """
    pending: deque[tuple[list[Row], list[Callable[[], Arrays]]]] = deque()
    for rows, batch in _batch_images(images, batch_size, report_failure):
        per_encoder = zip(encoders, zip(*batch, strict=True), strict=True)
        # Starts this batch before waiting for the previous one.
        pending.append((rows, [encoder.encode_async(pixels) for encoder, pixels in per_encoder]))
        if len(pending) > 1:
            previous_rows, pending_features = pending.popleft()
            yield previous_rows, [get() for get in pending_features]
    for rows, pending_features in pending:
        yield rows, [get() for get in pending_features]


def _batch_images(
    images: Iterator[tuple[Row, LoadedImage | ImageError]], batch_size: int, report_failure: ReportFailure
) -> Iterator[tuple[list[Row], list[tuple[npt.NDArray[np.uint8], ...]]]]:
    rows: list[Row] = []
    batch: list[tuple[npt.NDArray[np.uint8], ...]] = []
    for row, image in images:
        if isinstance(image, ImageError):
            report_failure(row, image)
            continue
        properties = {"width": image.width, "height": image.height, "content_hash": f"{image.content_hash:016x}"}
        rows.append({**row, **properties})
        batch.append((image.pixels, *image.extra_pixels))
        if len(rows) == batch_size:
            yield rows, batch
            rows, batch = [], []
    if rows:
        yield rows, batch


def load_shared_encoder(
    config: EncoderConfig, device: str, threads: int | None, description: Mapping[str, Any] | None = None
) -> ImageEncoder:
    """Returns an encoder that all threads of this process share, and sets the number of CPU threads unless it is None.

    Raises:
        DatasetError: the encoder differs from `description`, for example because its weights file is different.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    encoder = _load_encoder_once(config, device)
    if description is not None and encoder.description != description:
        lines = describe_differences(description, encoder.description)
        raise DatasetError(f"the encoder of this worker differs from the dataset's encoder: {'; '.join(lines)}")
    return encoder


_shared_encoders: LRUCache[object, ImageEncoder] = LRUCache(2)  # a captioner and a dual encoder may need one each
_load_encoder_once = cached(_shared_encoders, condition=Condition())(open_encoder)  # threads wait while one loads
