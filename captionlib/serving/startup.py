"""Opens all that the application needs from folders, in the process that serves."""

from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI

import captionlib.search
from captionlib.data.images.decoder_pool import DecoderConfig
from captionlib.errors import ConfigError
from captionlib.serving.app import create_app
from captionlib.serving.config import ServingConfig
from captionlib.serving.service import Library

__all__ = ["Served", "open_app"]


@dataclass(frozen=True)
class Served:
    """What is served; plain values, so that every process of a server opens the same.

    Attributes:
        index: its folder.
        thumbnails: the folder where they are kept.
        ranker: the checkpoint that made the embeddings of the index; None asks for words alone.
        captioner: a checkpoint that captions uploaded photographs.
        weights: the encoder's weights file, where the models learned from features of such a file.
        sentences: a file of sentences, one a line, that photographs are compared with.
        device: where the models run.
        limits: of the application.
    """

    index: str
    thumbnails: str
    ranker: str | None = None
    captioner: str | None = None
    weights: str | None = None
    sentences: str | None = None
    device: str = "auto"
    limits: ServingConfig = field(default_factory=ServingConfig)


def open_app(served: Served) -> FastAPI:
    """The application over these folders.

    Raises:
        CheckpointError: a checkpoint is not there, or not one for this index.
        ConfigError: the sentences cannot be read, or the encoder not be loaded.
        DatasetError: there is no index.
    """
    from captionlib.search.models import load_query_encoder

    ranker = load_query_encoder(served.ranker, served.device) if served.ranker else None
    index = captionlib.search.open(served.index, ranker)
    photos = None
    if ranker is not None or served.captioner is not None:
        from captionlib.search.models import ImageQueryModels  # loads torch, which takes seconds

        limits = served.limits
        decoding = DecoderConfig(timeout_seconds=limits.image_timeout_seconds, max_image_pixels=limits.max_image_pixels)
        photos = ImageQueryModels(ranker, served.captioner, served.weights, served.device, decoding)
    library = Library(index, served.limits, ranker, photos, _read_sentences(served.sentences))
    return create_app(library, Path(served.thumbnails))


def _read_sentences(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sentences {file}: cannot be read: {error}") from error
    return [line.strip() for line in lines if line.strip()]
