"""Photographs that are in no index, as questions: decoded by the guarded decoders, embedded and captioned."""

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captionlib.config import describe_differences
from captionlib.data.images.decoder_pool import DecoderConfig, DecoderPool
from captionlib.errors import CheckpointError, QueryError
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner, load_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.encoders.encoder import Encoder, EncoderConfig, load_encoder
from captionlib.search.encoders import SentenceEncoder

__all__ = ["ImageQueryModels"]

_CANDIDATES = pa.schema([("caption", pa.string()), ("log_prob", pa.float32())])


class _Eye(NamedTuple):
    """An encoder, and the decoders that give it what it expects."""

    encoder: Encoder
    decoders: DecoderPool


class ImageQueryModels:
    """Turns photographs into vectors and captions. A context manager; safe to use from many threads.

    Args:
        ranker: puts them into the space of an index; None only captions.
        captioner: a checkpoint's folder; None only embeds.
        weights: the encoder's weights file, where the models learned from features of such a file, unless the captioner
            brings it.
        device: where the models run.
        decoding: limits of decoding one image.

    Raises:
        CheckpointError: there is no captioner, or the encoder is not the one that a model learned from.
        ConfigError: the encoder cannot be loaded.
    """

    def __init__(
        self,
        ranker: SentenceEncoder | None = None,
        captioner: str | None = None,
        weights: str | None = None,
        device: str = "auto",
        decoding: DecoderConfig | None = None,
    ) -> None:
        self._ranker = ranker
        self._captioner: LoadedCaptioner | None = load_captioner(captioner, device) if captioner else None
        self._decoding = decoding or DecoderConfig()
        self._device = device
        self._lock = threading.Lock()  # the models compute on all cores for one photograph
        self._opened = ExitStack()
        self._eyes: list[tuple[Mapping[str, Any], _Eye]] = []
        self._caption_eye = None
        if self._captioner is not None:
            self._caption_eye = self._eye(self._captioner.encoder, self._captioner.encoder_weights or weights)
        self._embedding_eye = self._eye(ranker.encoder, weights) if ranker else None  # may be the same one

    def __enter__(self) -> "ImageQueryModels":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the decoders."""
        self._opened.close()

    @property
    def can_embed(self) -> bool:
        return self._embedding_eye is not None

    @property
    def can_caption(self) -> bool:
        return self._caption_eye is not None

    def embed(self, content: bytes) -> npt.NDArray[np.float32]:
        """The unit vector of a photograph, `[size]`.

        Raises:
            DecodeError: it is no image, or one that is not allowed.
            QueryError: there is no ranker.
        """
        if self._embedding_eye is None or self._ranker is None:
            raise QueryError("images are compared by the ranker that made the embeddings; give its checkpoint")
        features = self._see(self._embedding_eye, content)
        with self._lock:
            vector: npt.NDArray[np.float32] = self._ranker.encode_features(features)[0]
        return vector

    def caption(self, content: bytes, n_best: int = 5) -> pa.Table:
        """What the captioner says of a photograph, the most likely first: caption and log_prob.

        Raises:
            DecodeError: it is no image, or one that is not allowed.
            QueryError: there is no captioner.
        """
        if self._caption_eye is None or self._captioner is None:
            raise QueryError("captions of a new image need a captioner; give its checkpoint")
        features = self._see(self._caption_eye, content)
        vocabulary = self._captioner.vocabulary
        with self._lock:
            decoder = Decoder(self._captioner.model, DecodingConfig(beam_width=max(5, n_best), n_best=n_best))
            (candidates,) = decoder.decode(features.astype(np.float32))
        rows = [{"caption": vocabulary.decode(one.token_ids), "log_prob": one.log_prob} for one in candidates]
        return pa.Table.from_pylist(rows, _CANDIDATES)

    def _see(self, eye: _Eye, content: bytes) -> npt.NDArray[np.floating]:
        pixels = eye.decoders.decode(content)
        with self._lock:
            return eye.encoder.encode(pixels[None])

    def _eye(self, description: Mapping[str, Any], weights: str | None) -> _Eye:
        for known, eye in self._eyes:
            if not describe_differences(known, description):
                return eye
        encoder = load_encoder(EncoderConfig.from_description(description, weights), self._device)
        if lines := describe_differences(description, encoder.description):
            raise CheckpointError(f"the encoder here is not the one that the model learned from ({'; '.join(lines)})")
        eye = _Eye(encoder, self._opened.enter_context(DecoderPool(encoder.preprocessing, self._decoding)))
        self._eyes.append((description, eye))
        return eye
