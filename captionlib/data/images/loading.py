"""Fetches and decodes images in parallel, and yields them in order. The number of prefetched images is limited."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import PositiveInt

from captionlib.config import configclass
from captionlib.data.images.decoder_pool import DecoderConfig, DecoderPool
from captionlib.data.images.decoding import DecodedImage, Preprocessing, SizeLimit
from captionlib.data.images.fetching import FetchConfig, ImageFetcher
from captionlib.errors import ImageError

__all__ = ["LoadImages", "LoadedImage", "LoadingConfig", "hash_content", "load_images", "open_loader"]

Row = dict[str, Any]
"""Values of an image by column name. The address of the image is in `uri`; other values are only passed on."""


@dataclass(frozen=True)
class LoadedImage(DecodedImage):
    """A decoded image and a hash of its file."""

    content_hash: int  # see `hash_content`
    extra_pixels: tuple[npt.NDArray[np.uint8], ...] = ()  # from each extra preprocessing of `open_loader`


LoadImages = Callable[[Iterable[Row]], Iterator[tuple[Row, LoadedImage | ImageError]]]
"""Function that yields each row with its image, or with the error that loading the image raised."""


@configclass
class LoadingConfig:
    """How to load images.

    Attributes:
        threads: number of images that are fetched in parallel.
        prefetch: maximum number of images that are loading or waiting for the model. Memory usage grows with it.
        fetch: limits on fetching an image.
        decode: limits on decoding an image.
    """

    threads: PositiveInt = 16
    prefetch: PositiveInt = 128
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode: DecoderConfig = field(default_factory=DecoderConfig)


@contextmanager
def open_loader(
    config: LoadingConfig, preprocessing: Preprocessing | SizeLimit, *extra_preprocessing: Preprocessing | SizeLimit
) -> Iterator[LoadImages]:
    """Starts threads and decoder processes, and yields a function that loads images; see `load_images`.

    Every image is fetched once, and decoded with `preprocessing` and with each one in `extra_preprocessing`. On exit,
    all fetching and decoding in progress is canceled.
    """
    with ExitStack() as stack:  # exits in reverse order, so threads are joined after their work is canceled
        threads = stack.enter_context(ThreadPoolExecutor(config.threads, thread_name_prefix="load-images"))
        fetcher = stack.enter_context(ImageFetcher(config.fetch))
        decoders, *extra_decoders = (
            stack.enter_context(DecoderPool(each, config.decode)) for each in (preprocessing, *extra_preprocessing)
        )

        def load(uri: str) -> LoadedImage:
            content = fetcher.fetch(uri)
            image = decoders.decode(content)
            extra_pixels = tuple(each.decode(content).pixels for each in extra_decoders)
            return LoadedImage(image.pixels, image.width, image.height, hash_content(content), extra_pixels)

        yield lambda rows: load_images(rows, load, executor=threads, prefetch=config.prefetch)


def load_images(
    rows: Iterable[Row], load: Callable[[str], LoadedImage], executor: Executor, prefetch: int
) -> Iterator[tuple[Row, LoadedImage | ImageError]]:
    """Yields each row with the image that `load` returns for its `uri`, or with the ImageError that `load` raises.

    At any time, at most `prefetch` images are loading or waiting to be consumed.
    """

    def try_load(row: Row) -> tuple[Row, LoadedImage | ImageError]:
        try:
            return row, load(row["uri"])
        except ImageError as error:
            return row, error

    pending: deque[Future[tuple[Row, LoadedImage | ImageError]]] = deque()
    try:
        for row in rows:
            if len(pending) == prefetch:
                yield pending.popleft().result()
            pending.append(executor.submit(try_load, row))
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def hash_content(content: bytes) -> int:
    """Returns the XXH3 hash of the bytes of an image file, an unsigned integer of 64 bits."""
    digest: int = xxhash.xxh3_64_intdigest(content)
    return digest
