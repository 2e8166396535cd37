"""Generates captions from image features, or from images by running the encoder in the same pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import PositiveInt

from captionlib.config import configclass
from captionlib.data.images.loading import LoadingConfig
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, captions_schema
from captionlib.data.shards.stages import ProcessRows
from captionlib.errors import ImageError
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner, LoadedRanker, load_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.datastore import read_datastore
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.decoding.incremental import Candidate
from captionlib.models.devices import resolve_device
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.attention_maps import compute_attention_maps, require_attention
from captionlib.models.inference.embedding import SHARED_RANKERS, build_embedding_rows
from captionlib.models.inference.feature_source import EncodedRows, open_feature_source
from captionlib.models.inference.shared_models import CheckpointCache, PinnedCheckpoint, cached_per_process

__all__ = [
    "SHARED_CAPTIONERS",
    "CaptionGeneration",
    "GenerationConfig",
    "build_caption_rows",
    "caption_images",
]

SHARED_CAPTIONERS: CheckpointCache[LoadedCaptioner] = CheckpointCache(load_captioner)

Row = dict[str, Any]


@configclass
class GenerationConfig:
    """Configuration of caption generation.

    Attributes:
        decoding: beam search or sampling. An image's samples depend only on its id and the seed.
        dtype: dtype of the captioner's computation.
        batch_size: images per batch of the captioner.
        loading: how to fetch and decode images, if captions are generated from images.
        encoder_batch_size: images per batch of the encoder, if captions are generated from images.
        attention_maps: store the attention weights of each token of the best caption; requires a captioner with
            attention.
    """

    decoding: DecodingConfig = field(default_factory=lambda: DecodingConfig(n_best=5))
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: PositiveInt = 100
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    encoder_batch_size: PositiveInt = 32
    attention_maps: bool = False


@dataclass(frozen=True)
class CaptionGeneration:
    """Pipeline stage from a features dataset or a manifest (list of images) to a captions dataset.

    Attributes:
        config: configuration of the generation.
        captioner: the captioner's checkpoint, pinned to one version.
        encoder: configuration of the image encoder; None if the input contains features.
        device: device of the models.
        threads: number of CPU threads of the models. If None, PyTorch's default is used.
        ranker: dual encoder for retrieval that embeds the images as a second output; if None, there is only one output.
        datastore: hash of the datastore (training images for reranking); None if decoding does not use it.
    """

    config: GenerationConfig
    captioner: PinnedCheckpoint
    encoder: EncoderConfig | None = None
    device: str = "auto"
    threads: int | None = None
    ranker: PinnedCheckpoint | None = None
    datastore: str | None = None

    @property
    def columns(self) -> Sequence[str]:
        properties = ["image_id", "uri", "version", "split"]
        return properties if self.encoder else [*properties, "width", "height", "content_hash", "features"]

    @contextmanager
    def open(self) -> Iterator[ProcessRows]:
        """Loads the models; see `Stage.open`."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        config = self.config
        captioner = SHARED_CAPTIONERS.get(self.captioner, self.device)
        decoder = _load_decoder_once(self.captioner, self.datastore, config.decoding, config.dtype, self.device)
        ranker = SHARED_RANKERS.get(self.ranker, self.device) if self.ranker else None
        with open_feature_source(
            self.encoder, captioner.encoder, config.loading, config.encoder_batch_size, self.device, self.threads
        ) as load_features:
            yield lambda batches, fail: _caption_batches(
                load_features(batches, fail), captioner, decoder, config, ranker
            )


def _caption_batches(
    encoded: EncodedRows,
    captioner: LoadedCaptioner,
    decoder: Decoder,
    config: GenerationConfig,
    ranker: LoadedRanker | None = None,
) -> Iterator[tuple[pa.RecordBatch, ...]]:
    for rows, features in _rebatch(encoded, config.batch_size):
        inputs = features.astype(np.float32)
        candidates = decoder.decode(inputs, keys=[row["image_id"] for row in rows])
        attention = None
        if config.attention_maps:
            attention = compute_attention_maps(captioner.model, inputs, [per_image[0] for per_image in candidates])
        captions = build_caption_rows(rows, candidates, captioner, attention)
        yield (captions,) if ranker is None else (captions, build_embedding_rows(rows, features, ranker))


@cached_per_process
def _load_decoder_once(
    checkpoint: PinnedCheckpoint, datastore_version: str | None, decoding: DecodingConfig, dtype: str, device: str
) -> Decoder:
    captioner = SHARED_CAPTIONERS.get(checkpoint, device)
    datastore = None
    if datastore_version is not None:
        datastore = read_datastore(checkpoint.folder, captioner)
        checkpoint.require_unchanged("datastore", datastore_version, datastore.fingerprint)
    return Decoder(captioner.model, decoding, getattr(torch, dtype), captioner.vocabulary, datastore)


def build_caption_rows(
    rows: Sequence[Row],
    candidates: Sequence[Sequence[Candidate]],
    captioner: LoadedCaptioner,
    attention: pa.Array | None = None,
) -> pa.RecordBatch:
    """Returns rows of a captions dataset from n-best lists; `attention` is from `compute_attention_maps`."""
    schema = captions_schema(None if attention is None else attention.type.value_type.list_size)
    texts = [[captioner.vocabulary.decode(candidate.token_ids) for candidate in per_image] for per_image in candidates]
    columns = {
        **{name: [row.get(name) for row in rows] for name in schema.names[: schema.names.index("caption")]},
        "caption": [per_image[0] for per_image in texts],
        "log_prob": [per_image[0].log_prob for per_image in candidates],
        "tokens": [per_image[0].token_count for per_image in candidates],
        "candidates": [
            [
                {"caption": text, "log_prob": candidate.log_prob}
                for text, candidate in zip(image_texts, per_image, strict=True)
            ]
            for image_texts, per_image in zip(texts, candidates, strict=True)
        ],
    }
    arrays = [pa.array(values, schema.field(name).type) for name, values in columns.items()]
    return pa.RecordBatch.from_arrays([*arrays, *([] if attention is None else [attention])], schema=schema)


def caption_images(
    uris: Sequence[str],
    checkpoint: str,
    config: GenerationConfig = GenerationConfig(),
    *,
    weights: str | None = None,
    device: str = "auto",
    captioner: LoadedCaptioner | None = None,
) -> tuple[list[Row], list[tuple[str, ImageError]]]:
    """Captions images that are not part of a dataset.

    Example:
        >>> rows, failures = captionlib.caption_images(["scenes/images/test-00000.jpg"], "captioner")
        >>> len(rows), len(failures)
        (1, 0)

    Args:
        uris: paths or URLs of the images.
        checkpoint: the captioner's folder.
        config: configuration of the generation.
        weights: path of the encoder's weights file; required if the encoder was loaded from a file that the checkpoint
            does not contain.
        device: auto, cpu, cuda or cuda:N.
        captioner: the captioner of `checkpoint`, if it is already loaded. If None, it is loaded.

    Returns:
        Rows of a captions dataset in the given order, and the uri and error of each image that could not be read.

    Raises:
        CheckpointError: the folder contains no captioner, or the captioner lacks attention or a datastore that
            `config` requires.
        ConfigError: `weights` are required.
    """
    captioner = captioner or load_captioner(checkpoint, str(resolve_device(device)))
    if config.attention_maps:
        require_attention(captioner, checkpoint)
    encoder = EncoderConfig.from_description(captioner.encoder, weights or captioner.encoder_weights)
    datastore = read_datastore(checkpoint, captioner) if config.decoding.rerank.neighbors else None
    dtype = getattr(torch, config.dtype)
    decoder = Decoder(captioner.model, config.decoding, dtype, captioner.vocabulary, datastore)
    failures: list[tuple[str, ImageError]] = []
    with open_feature_source(
        encoder, captioner.encoder, config.loading, config.encoder_batch_size, device, None
    ) as load_features:
        images = [{"image_id": uri, "uri": uri, "split": "", "captions": []} for uri in uris]
        batches = iter([pa.RecordBatch.from_pylist(images, schema=MANIFEST_SCHEMA)])
        encoded = load_features(batches, lambda row, error: failures.append((row["uri"], error)))
        captions = _caption_batches(encoded, captioner, decoder, config)
        return [row for (batch,) in captions for row in batch.to_pylist()], failures


def _rebatch(encoded: EncodedRows, size: int) -> EncodedRows:
    """Regroups batches of any length into batches of `size` rows; the last one may be shorter."""
    rows: list[Row] = []
    features: list[npt.NDArray[np.floating]] = []
    for more_rows, more_features in encoded:
        rows = rows + more_rows
        features.append(more_features)
        while len(rows) >= size:
            joined = np.concatenate(features)
            yield rows[:size], joined[:size]
            rows, features = rows[size:], [joined[size:]]
    if rows:
        yield rows, np.concatenate(features)
