"""Fetches and decodes images in parallel and in order, and prefetches a limited number of them for the model."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import field
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import PositiveInt

from captionlib.config import configclass
from captionlib.data.images.decoder_pool import DecoderConfig, DecoderPool
from captionlib.data.images.decoding import Preprocessing
from captionlib.data.images.fetching import FetchConfig, ImageFetcher
from captionlib.errors import ImageError

__all__ = ["LoadImages", "LoadingConfig", "load_images", "open_loader"]

Row = dict[str, Any]
Pixels = npt.NDArray[np.uint8]

LoadImages = Callable[[Iterable[Row]], Iterator[tuple[Row, Pixels | ImageError]]]
"""Yields each row with its image, `[crop_size, crop_size, 3] uint8`, or with the error that loading it raised."""


@configclass
class LoadingConfig:
    """How images are loaded.

    Attributes:
        threads: number of images that are fetched in parallel.
        prefetch: maximum number of images that are loading or waiting for the model. It determines memory usage.
        fetch: limits on fetching an image.
        decode: limits on decoding an image.
    """

    threads: PositiveInt = 16
    prefetch: PositiveInt = 128
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode: DecoderConfig = field(default_factory=DecoderConfig)


@contextmanager
def open_loader(config: LoadingConfig, preprocessing: Preprocessing) -> Iterator[LoadImages]:
    """Starts threads and decoder processes, and yields a function that loads images; see `load_images`.

    On exit, all fetching and decoding in progress is canceled.
    """
    with ExitStack() as stack:  # exits in reverse order, so threads are joined after their work is canceled
        threads = stack.enter_context(ThreadPoolExecutor(config.threads, thread_name_prefix="load-images"))
        fetcher = stack.enter_context(ImageFetcher(config.fetch))
        decoders = stack.enter_context(DecoderPool(preprocessing, config.decode))
        yield lambda rows: load_images(
            rows, lambda uri: decoders.decode(fetcher.fetch(uri)), executor=threads, prefetch=config.prefetch
        )


def load_images(
    rows: Iterable[Row], load: Callable[[str], Pixels], executor: Executor, prefetch: int
) -> Iterator[tuple[Row, Pixels | ImageError]]:
    """Yields each row with the image that `load` returns for its `uri`, or with the ImageError that `load` raises.

    At any time, at most `prefetch` images are loading or waiting to be consumed.
    """

    def try_load(row: Row) -> tuple[Row, Pixels | ImageError]:
        try:
            return row, load(row["uri"])
        except ImageError as error:
            return row, error

    pending: deque[Future[tuple[Row, Pixels | ImageError]]] = deque()
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
