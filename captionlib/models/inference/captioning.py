"""Captions by the shard: from `features/`, or from the images of `manifest/` with encoder and captioner in one pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from captionlib.data.images.loading import LoadingConfig
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, captions_schema
from captionlib.data.shards.stages import ProcessRows
from captionlib.errors import CheckpointError, ConfigError, ImageError
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner, LoadedRanker, load_captioner
from captionlib.models.decoding.candidate import Candidate
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.datastore import datastore_fingerprint, read_datastore
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.devices import resolve_device
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.attention_maps import map_attention, require_attention
from captionlib.models.inference.embedding import PinnedRanker, build_embedding_rows
from captionlib.models.inference.feature_source import open_feature_source
from captionlib.models.inference.shared_models import cached_per_process

__all__ = [
    "CaptionGeneration",
    "GenerationConfig",
    "build_caption_rows",
    "caption_images",
    "find_datastore_fingerprint",
]

Row = dict[str, Any]


@dataclass(frozen=True)
class GenerationConfig:
    """How captions are made.

    Attributes:
        decoding: how sentences are searched for, or drawn; what is drawn for an image depends on its id and the seed.
        dtype: what the captioner computes in.
        batch_size: images decoded at a time.
        loading: how images are fetched and decoded, where captions are made from images.
        encoder_batch_size: images a batch of the encoder, likewise.
        attention_maps: keep where the captioner looked for each token of the best caption; it needs one with attention.
    """

    decoding: DecodingConfig = field(default_factory=lambda: DecodingConfig(n_best=5))
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 100
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    encoder_batch_size: int = 32
    attention_maps: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "encoder_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class CaptionGeneration:
    """The stage from `features/` or `manifest/` to `captions/`, and to `embeddings/` where there is a ranker.

    Attributes:
        config: how captions are made.
        checkpoint: the captioner's folder.
        fingerprint: of the captioner that the output belongs to; a worker that finds another stops at once.
        encoder: makes features of images; None where the rows have features.
        device: where the models run.
        threads: that they compute with on a CPU; None as PyTorch chooses.
        ranker: embeds the images in the same pass, into a second output; None for captions alone.
        memory: the fingerprint of what the captioner remembers, likewise; None where it has no say.
    """

    config: GenerationConfig
    checkpoint: str
    fingerprint: str
    encoder: EncoderConfig | None = None
    device: str = "auto"
    threads: int | None = None
    ranker: PinnedRanker | None = None
    memory: str | None = None

    @property
    def columns(self) -> Sequence[str]:
        return ["image_id", "uri", "split", *([] if self.encoder else ["features"])]

    @contextmanager
    def open(self) -> Iterator[ProcessRows]:
        """Loads the models; see `Stage.open`."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        captioner, decoder = _shared_captioner(
            self.checkpoint,
            self.fingerprint,
            self.memory,
            self.config.decoding,
            getattr(torch, self.config.dtype),
            str(resolve_device(self.device)),
        )
        if self.config.attention_maps:
            require_attention(captioner, self.checkpoint)
        ranker = self.ranker.open(self.device) if self.ranker else None
        config = self.config
        with open_feature_source(
            self.encoder, captioner.encoder, config.loading, config.encoder_batch_size, self.device, self.threads
        ) as load_features:
            yield lambda rows, fail: self._caption(load_features(rows, fail), captioner, decoder, ranker)

    def _caption(
        self,
        encoded: Iterator[tuple[list[Row], npt.NDArray[np.floating]]],
        captioner: LoadedCaptioner,
        decoder: Decoder,
        ranker: LoadedRanker | None,
    ) -> Iterator[tuple[pa.RecordBatch, ...]]:
        for rows, features in _rebatch(encoded, self.config.batch_size):
            seen = features.astype(np.float32)
            candidates = decoder.decode(seen, keys=[row["image_id"] for row in rows])
            attention = None
            if self.config.attention_maps:
                attention = map_attention(captioner.model, seen, [some[0] for some in candidates])
            captions = build_caption_rows(rows, candidates, captioner, attention)
            yield (captions,) if ranker is None else (captions, build_embedding_rows(rows, features, ranker))


@cached_per_process
def _shared_captioner(
    checkpoint: str, fingerprint: str, memory: str | None, decoding: DecodingConfig, dtype: torch.dtype, device: str
) -> tuple[LoadedCaptioner, Decoder]:
    captioner = load_captioner(checkpoint, device)
    found = [("captioner", fingerprint, captioner.fingerprint)]
    remembered = None
    if memory is not None:
        remembered = read_datastore(checkpoint, captioner)
        found.append(("memory", memory, remembered.fingerprint))
    for what, expected, got in found:
        if got != expected:
            raise CheckpointError(
                f"{checkpoint}: expected {what} {expected}, got {got}; "
                "it was replaced while the captions were made: start again with --overwrite"
            )
    return captioner, Decoder(captioner.model, decoding, dtype, captioner.vocabulary, remembered)


def find_datastore_fingerprint(checkpoint: str, captioner: LoadedCaptioner, decoding: DecodingConfig) -> str | None:
    """The fingerprint of what the captioner remembers, where neighbors have a say.

    Raises:
        CheckpointError: it remembers nothing.
    """
    return datastore_fingerprint(checkpoint, captioner) if decoding.rerank.neighbors else None


def build_caption_rows(
    rows: Sequence[Row],
    candidates: Sequence[Sequence[Candidate]],
    captioner: LoadedCaptioner,
    attention: pa.Array | None = None,
) -> pa.RecordBatch:
    """Rows of `captions/`: the best candidate in columns of its own, and all of them; with attention, its maps."""
    schema = captions_schema(None if attention is None else attention.type.value_type.list_size)
    words = [[captioner.vocabulary.decode(one.token_ids) for one in some] for some in candidates]
    columns = {
        **{name: [row[name] for row in rows] for name in ("image_id", "uri", "split")},
        "caption": [some[0] for some in words],
        "log_prob": [some[0].log_prob for some in candidates],
        "tokens": [some[0].token_count for some in candidates],
        "candidates": [
            [{"caption": text, "log_prob": one.log_prob} for text, one in zip(texts, some, strict=True)]
            for texts, some in zip(words, candidates, strict=True)
        ],
    }
    plain = [pa.array(columns[name], schema.field(name).type) for name in columns]
    return pa.RecordBatch.from_arrays([*plain, *([] if attention is None else [attention])], schema=schema)


def _rebatch(
    encoded: Iterator[tuple[list[Row], npt.NDArray[np.floating]]], size: int
) -> Iterator[tuple[list[Row], npt.NDArray[np.floating]]]:
    """Pieces of any length to batches of `size` rows, the last one shorter."""
    rows: list[Row] = []
    features: list[npt.NDArray[np.floating]] = []
    for more_rows, more_features in encoded:
        rows = rows + more_rows
        features.append(more_features)
        while len(rows) >= size:
            together = np.concatenate(features)
            yield rows[:size], together[:size]
            rows, features = rows[size:], [together[size:]]
    if rows:
        yield rows, np.concatenate(features)


def caption_images(
    uris: Sequence[str],
    checkpoint: str,
    config: GenerationConfig,
    *,
    weights: str | None = None,
    device: str = "auto",
) -> tuple[list[Row], list[tuple[str, ImageError]]]:
    """Captions single images, outside of any dataset.

    Args:
        uris: paths or addresses.
        checkpoint: the captioner's folder.
        config: how captions are made.
        weights: the encoder's weights file, where the captioner learned from features of such a file and does not bring
            it.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        Rows of `captions/` in the order given; and what could not be had, with the reason.
    """
    captioner = load_captioner(checkpoint)
    encoder = EncoderConfig.from_description(captioner.encoder, weights or captioner.encoder_weights)
    memory = find_datastore_fingerprint(checkpoint, captioner, config.decoding)
    stage = CaptionGeneration(config, checkpoint, captioner.fingerprint, encoder, device, memory=memory)
    rows = pa.RecordBatch.from_pylist(
        [{"image_id": uri, "uri": uri, "split": "", "captions": []} for uri in uris], schema=MANIFEST_SCHEMA
    )
    failures: list[tuple[str, ImageError]] = []
    with stage.open() as process:
        outputs = process(iter([rows]), lambda _id, uri, error: failures.append((uri, error)))
        captions = [row for (batch,) in outputs for row in batch.to_pylist()]
    return captions, failures
