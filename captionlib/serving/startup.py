"""Loads the index and models of the web application in each server process."""

import ctypes
from contextlib import suppress
from dataclasses import field
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from captionlib.config import build_config, configclass
from captionlib.data.images.decoder_pool import DecoderConfig
from captionlib.search.index import open_index
from captionlib.serving.app import create_app
from captionlib.serving.config import ServingConfig
from captionlib.serving.service import SearchService

__all__ = ["AppConfig", "load_app"]

_M_ARENA_MAX = -8  # from glibc's malloc.h


@configclass
class AppConfig:
    """Folders, files and settings of the web application. They are passed to every server process."""

    index: str
    thumbnails: str
    ranker: str | None = None  # computed the embeddings of the index
    captioner: str | None = None  # for uploaded images
    weights: str | None = None  # of the image encoder, if the models were trained with an encoder from a file
    sentences: str | None = None  # text file to compare uploaded images with, one sentence per line
    generation: dict[str, Any] = field(default_factory=dict)  # see `GenerationConfig`
    device: str = "auto"
    serving: ServingConfig = field(default_factory=ServingConfig)


def load_app(config: AppConfig) -> FastAPI:
    """Opens the index, loads the models and creates the application.

    Raises:
        CheckpointError: a checkpoint is missing or does not match the index.
        ConfigError: the sentences or the encoder cannot be read.
        DatasetError: the folder is not an index.
    """
    _limit_allocator()
    limits = config.serving
    if config.ranker is None and config.captioner is None:
        index = open_index(config.index, refresh_seconds=None)
        return create_app(SearchService(index, limits), Path(config.thumbnails))

    from captionlib.models.families.ranker import open_ranker  # imports torch, which takes seconds
    from captionlib.models.inference.captioning import GenerationConfig
    from captionlib.search.models import ImageQueryModels, read_sentences

    ranker = open_ranker(config.ranker, config.device) if config.ranker else None
    index = open_index(config.index, ranker, refresh_seconds=None)
    sentences = read_sentences(config.sentences) if config.sentences else []
    decoding = DecoderConfig(timeout_seconds=limits.image_timeout_seconds, max_image_pixels=limits.max_image_pixels)
    generation = build_config(GenerationConfig, config.generation)
    models = ImageQueryModels(ranker, config.captioner, config.weights, config.device, decoding, generation)
    return create_app(SearchService(index, limits, models, sentences), Path(config.thumbnails))


def _limit_allocator() -> None:
    """Makes all threads share one heap of glibc's allocator. Otherwise the models use about 50 MB more per thread."""
    with suppress(AttributeError):  # a different C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
