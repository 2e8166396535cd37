"""Rows of addresses to pixels: fetched and decoded ahead of the model, in order, within a bound."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from captionlib.data.images.decoder_pool import DecoderConfig, DecoderPool
from captionlib.data.images.decoding import Preprocessing
from captionlib.data.images.fetching import FetchConfig, ImageFetcher
from captionlib.errors import ConfigError, ImageError

__all__ = ["LoadImages", "LoadingConfig", "load_images", "open_loader"]

Row = dict[str, Any]
Pixels = npt.NDArray[np.uint8]

LoadImages = Callable[[Iterable[Row]], Iterator[tuple[Row, Pixels | ImageError]]]
"""Gives each row its image, `[crop_size, crop_size, 3] uint8`, or the reason why there is none."""


@dataclass(frozen=True)
class LoadingConfig:
    """How images are loaded.

    Attributes:
        threads: images fetched at a time.
        prefetch: images at most that are fetched, decoded or waiting for the model; what memory depends on.
        fetch: limits of fetching one.
        decode: the decoder processes, and limits of decoding one.
    """

    threads: int = 16
    prefetch: int = 128
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        for name in ("threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")


@contextmanager
def open_loader(config: LoadingConfig, preprocessing: Preprocessing) -> Iterator[LoadImages]:
    """Threads and decoders for as many calls of `load_images` as one likes.

    At the end all of them are gone, whatever they were doing: an image that is being fetched or decoded is given up.

    Args:
        config: see there.
        preprocessing: what the encoder expects.

    Yields:
        A function from rows to rows with their images; see `load_images`.
    """
    with ExitStack() as stack:  # closes in reverse: threads end when nothing is left for them to wait for
        threads = stack.enter_context(ThreadPoolExecutor(config.threads, thread_name_prefix="load-images"))
        fetcher = stack.enter_context(ImageFetcher(config.fetch))
        decoders = stack.enter_context(DecoderPool(preprocessing, config.decode))
        yield lambda rows: load_images(
            rows, lambda uri: decoders.decode(fetcher.fetch(uri)), executor=threads, prefetch=config.prefetch
        )


def load_images(
    rows: Iterable[Row], load: Callable[[str], Pixels], executor: Executor, prefetch: int
) -> Iterator[tuple[Row, Pixels | ImageError]]:
    """Loads the images of rows ahead of the one who asks for them; what is not asked for any more is not started.

    Args:
        rows: with a `uri` each.
        load: gives the image at an address, or raises ImageError.
        executor: where it runs.
        prefetch: images at most that are loaded, or on their way, and not yet taken.

    Yields:
        Each row with its image or the reason why there is none, in the order of the rows.
    """
    waiting: deque[tuple[Row, Future[Pixels | ImageError]]] = deque()
    try:
        for row in rows:
            if len(waiting) == prefetch:
                yield _taken(waiting)
            waiting.append((row, executor.submit(_try, load, row["uri"])))
        while waiting:
            yield _taken(waiting)
    finally:
        for _, future in waiting:
            future.cancel()


def _taken(waiting: deque[tuple[Row, Future[Pixels | ImageError]]]) -> tuple[Row, Pixels | ImageError]:
    row, future = waiting.popleft()
    return row, future.result()


def _try(load: Callable[[str], Pixels], uri: str) -> Pixels | ImageError:
    try:
        return load(uri)
    except ImageError as error:
        return error
