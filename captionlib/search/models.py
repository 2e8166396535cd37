"""Computes embeddings and captions of query images that are not in the index."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captionlib.data.images.decoder_pool import DecoderConfig, DecoderPool
from captionlib.data.images.loading import hash_content
from captionlib.errors import ConfigError, QueryError
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.families.captioner import open_captioner
from captionlib.models.families.encoder import ImageEncoder, open_encoder
from captionlib.models.families.model import Arrays, ImageModel
from captionlib.models.families.ranker import RankingModel
from captionlib.models.inference.captioning import GenerationConfig
from captionlib.models.inference.extraction import PixelPassthrough
from captionlib.models.inference.image_text_scores import check_needs_no_ranker, score_captions

__all__ = ["ImageQueryModels", "read_sentences"]

_CANDIDATES = pa.schema([("caption", pa.string()), ("log_prob", pa.float32()), ("tokens", pa.int32())])
_SCORED_CANDIDATES = _CANDIDATES.append(pa.field("image_text_score", pa.float32()))
_ImageEncoder = tuple[ImageEncoder | PixelPassthrough, DecoderPool]  # the pool applies the encoder's preprocessing
_SENTENCES = pa.schema([("sentence", pa.string()), ("score", pa.float32())])


def read_sentences(path: str) -> list[str]:
    """Reads the sentences for `ImageQueryModels.rank_sentences` from a text file, one per line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--sentences {path} cannot be read: {error}") from error
    return [line.strip() for line in lines if line.strip()]


class ImageQueryModels:
    """Embeds images with a ranker (image-text retrieval model), and captions them with a captioner. Thread-safe.

    As a context manager, it stops the decoder processes on exit. `captioner` is a folder, or an address such as
    `hf:FOLDER`. `weights` is the weights file of the image encoder, if the models do not contain its weights.

    A method raises QueryError if the model that it needs is missing, and DecodeError if the file is not an image or
    exceeds the limits.

    Raises:
        CheckpointError: the captioner is missing, or the encoder differs from the one that a model was trained with.
        ConfigError: the encoder cannot be loaded.
    """

    def __init__(
        self,
        ranker: RankingModel | None = None,
        captioner: str | None = None,
        weights: str | None = None,
        device: str = "auto",
        image_decoding: DecoderConfig = DecoderConfig(),
        generation: GenerationConfig = GenerationConfig(),
    ) -> None:
        self._ranker = ranker
        self._image_decoding = image_decoding
        self._device = device
        self._lock = threading.Lock()  # a model uses all cores for one image
        self._resources = ExitStack()
        self._loaded: list[tuple[Mapping[str, Any], _ImageEncoder]] = []  # with the description of the encoder
        self._caption_encoder = None
        self._generation = generation
        if captioner is not None:
            if ranker is None:
                check_needs_no_ranker(generation.decoding)
            model = open_captioner(captioner, device)
            self._generate = model.prepare(generation)
            self._caption_encoder = self._load_encoder(model, weights)
        # If both models have the same encoder, `_load_encoder` loads it only once.
        self._embedding_encoder = self._load_encoder(ranker, weights) if ranker else None

    def __enter__(self) -> "ImageQueryModels":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._resources.close()

    @property
    def can_embed(self) -> bool:
        return self._embedding_encoder is not None

    @property
    def can_caption(self) -> bool:
        return self._caption_encoder is not None

    def embed(self, content: bytes) -> npt.NDArray[np.float32]:
        """Returns the embedding of an image file, `[dimension]`, scaled to unit length."""
        if self._embedding_encoder is None or self._ranker is None:
            raise QueryError("searching by image requires the ranker that computed the embeddings")
        images = self._encode(self._embedding_encoder, content)
        with self._lock:
            vector: npt.NDArray[np.float32] = self._ranker.encode_images(images)[0]
        return vector

    def rank_sentences(self, vector: npt.NDArray[np.float32], sentences: Sequence[str]) -> pa.Table:
        """Returns the columns sentence and score, the similarity to the vector of an image, best first."""
        if self._ranker is None:
            raise QueryError("ranking sentences requires the ranker that computed the embeddings")
        if not sentences:
            raise QueryError("sentences: expected one per line, got none")
        with self._lock:
            scores = self._ranker.encode_sentences(sentences) @ vector
        order = np.argsort(-scores, kind="stable")
        columns = {"sentence": [sentences[position] for position in order], "score": scores[order].astype(np.float32)}
        return pa.Table.from_pydict(columns, _SENTENCES)

    def caption(self, content: bytes) -> pa.Table:
        """Returns candidate captions for an image file, best first, in the columns caption, log_prob and tokens.

        With a ranker, the table also has the column image_text_score.
        """
        if self._caption_encoder is None:
            raise QueryError("captioning an image requires a captioner")
        images = self._encode(self._caption_encoder, content)
        with self._lock:
            # The image id seeds sampling, so the same image gets the same captions.
            captions = self._generate(images, [f"{hash_content(content):016x}"])
        if self._ranker is not None:
            vector = self.embed(content)
            with self._lock:
                captions = score_captions(captions, vector[None], self._ranker, self._generation.decoding)
        rows = [
            {
                "caption": caption.text,
                "log_prob": caption.log_prob,
                "tokens": caption.token_count,
                "image_text_score": caption.image_text_score,
            }
            for caption in captions[0]
        ]
        return pa.Table.from_pylist(rows, _CANDIDATES if self._ranker is None else _SCORED_CANDIDATES)

    def _encode(self, image_encoder: _ImageEncoder, content: bytes) -> Arrays:
        encoder, decoders = image_encoder
        pixels = decoders.decode(content).pixels
        with self._lock:
            return encoder.encode_async([pixels])()

    def _load_encoder(self, model: ImageModel, weights: str | None) -> _ImageEncoder:
        for description, image_encoder in self._loaded:
            if description == model.encoder:
                return image_encoder
        transform = model.find_input_transform(weights)
        if isinstance(transform, EncoderConfig):
            opened = open_encoder(transform, self._device)
            model.require_encoder(opened.description)
            encoder: ImageEncoder | PixelPassthrough = opened
        else:
            encoder = PixelPassthrough(transform)  # the model takes pixels
        decoders = self._resources.enter_context(DecoderPool(encoder.preprocessing, self._image_decoding))
        self._loaded.append((model.encoder, (encoder, decoders)))
        return encoder, decoders
