"""Creates thumbnails of the images in an index on first access, and stores them on disk."""

import asyncio
import copy
import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Literal
from urllib.parse import urlsplit

from cachetools import TTLCache
from starlette.concurrency import run_in_threadpool

from captionlib.data.images.decoder_pool import DecoderConfig, DecoderPool
from captionlib.data.images.decoding import SizeLimit
from captionlib.data.images.encoding import encode_jpeg
from captionlib.data.images.fetching import FetchConfig, ImageFetcher
from captionlib.errors import ImageError
from captionlib.progress import progress_bar
from captionlib.serving.config import ServingConfig
from captionlib.serving.fair_thread_pool import FairThreadPool
from captionlib.serving.monitoring import THUMBNAILS
from captionlib.storage.folders import write_file

__all__ = ["ThumbnailSize", "Thumbnails", "create_thumbnails", "remove_thumbnails"]

ThumbnailSize = Literal["small", "large"]

_PREPROCESSING: dict[ThumbnailSize, SizeLimit] = {"small": SizeLimit(400), "large": SizeLimit(1280)}
_FAILURE_CACHE_SECONDS = 30.0
_MAX_CACHED_FAILURES = 10_000
_PRUNE_EVERY = 200  # created thumbnails
_BATCH = 200  # thumbnails that are submitted to the thread pool at once
_HOST_DIVISOR = 4  # one host can use a quarter of the threads
_MAX_WAITING_PER_THREAD = 4
_MAX_WAIT_SECONDS = 5.0


class Thumbnails:
    """Creates thumbnails and stores them as JPEG files in a folder. Exiting the context stops its threads.

    Slow hosts do not delay other requests, because images are fetched and decoded in separate threads, and a host can
    use only a quarter of them.
    """

    def __init__(self, folder: Path, config: ServingConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._max_bytes = config.max_thumbnail_bytes
        # Part of file names, so that a server without `allow_private_hosts` never shows thumbnails that a server with
        # this option has stored.
        self._scope = "all" if config.allow_private_hosts else "public"
        self._resources = ExitStack()
        threads = config.max_concurrent_fetches
        per_host = max(1, threads // _HOST_DIVISOR)
        max_waiting = _MAX_WAITING_PER_THREAD * threads
        self._threads = self._resources.enter_context(
            FairThreadPool("thumbnails", threads, per_host, max_waiting, _MAX_WAIT_SECONDS)
        )
        fetching = FetchConfig(
            timeout_seconds=config.image_timeout_seconds, attempts=1, allow_private_hosts=config.allow_private_hosts
        )
        decoding = DecoderConfig(timeout_seconds=config.image_timeout_seconds, max_image_pixels=config.max_image_pixels)
        self._fetcher = self._resources.enter_context(ImageFetcher(fetching))
        self._decoders = {
            size: self._resources.enter_context(DecoderPool(preprocessing, decoding))
            for size, preprocessing in _PREPROCESSING.items()
        }
        self._in_progress: dict[Path, asyncio.Task[bytes]] = {}
        self._failures: TTLCache[Path, ImageError] = TTLCache(_MAX_CACHED_FAILURES, _FAILURE_CACHE_SECONDS, monotonic)
        self._created_count = 0

    def __enter__(self) -> "Thumbnails":
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    async def get(self, uri: str, size: ThumbnailSize) -> bytes:
        """Returns the thumbnail of an image. `uri` must come from a dataset, not from a visitor.

        Raises:
            ImageError: the image cannot be read; the error is cached for half a minute.
            BusyError: too many images are being fetched.
        """
        path = _choose_path(self._folder, self._scope, size, uri)
        content = await run_in_threadpool(_read_stored, path)
        if content is not None:
            THUMBNAILS.labels("stored").inc()
            return content
        if path in self._failures:
            THUMBNAILS.labels("failed").inc()
            raise copy.copy(self._failures[path])  # raising the same object would add to its traceback each time
        if path not in self._in_progress:
            task = asyncio.create_task(self._create(uri, size, path))
            self._in_progress[path] = task
            task.add_done_callback(lambda _: self._in_progress.pop(path))
        return await asyncio.shield(self._in_progress[path])

    async def fetch(self, uri: str) -> bytes:
        """Returns the bytes of an image. `uri` must come from a dataset, not from a visitor.

        Raises:
            ImageError: the image cannot be fetched.
            BusyError: too many images are being fetched.
        """
        return await self._threads.run(urlsplit(uri).netloc, partial(self._fetcher.fetch, uri))

    def make(self, content: bytes, size: ThumbnailSize) -> bytes:
        """Creates a thumbnail of an image file without storing it."""
        return encode_jpeg(self._decoders[size].decode(content).pixels)

    def prune(self) -> None:
        """Removes the least recently used thumbnails until the total size is within the limit."""
        files = []
        for path in self._folder.rglob("*.jpg"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            files.append((stat.st_mtime, stat.st_size, path))
        excess = sum(size for _, size, _ in files) - self._max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def create_ahead(self, uri: str) -> bool:
        """Stores the small thumbnail of an image, unless it exists. Returns False if the image cannot be read."""
        path = _choose_path(self._folder, self._scope, "small", uri)
        if not path.exists():
            try:
                write_file(path, self.make(self._fetcher.fetch(uri), "small"))
            except ImageError:
                return False
        return True

    async def _create(self, uri: str, size: ThumbnailSize, path: Path) -> bytes:
        def create() -> bytes:
            content = self.make(self._fetcher.fetch(uri), size)
            write_file(path, content)
            return content

        try:
            content = await self._threads.run(urlsplit(uri).netloc, create)
        except ImageError as error:
            THUMBNAILS.labels("failed").inc()
            self._failures[path] = copy.copy(error)  # without the traceback, which refers to large objects
            raise
        THUMBNAILS.labels("created").inc()
        self._created_count += 1
        if self._created_count % _PRUNE_EVERY == 0:
            await run_in_threadpool(self.prune)
        return content


def _choose_path(folder: Path, scope: str, size: ThumbnailSize, uri: str) -> Path:
    name = hashlib.sha256(f"{scope} {_PREPROCESSING[size].max_size} {uri}".encode()).hexdigest()
    return folder / name[:2] / f"{name}.jpg"


def create_thumbnails(folder: Path, uris: Sequence[str], config: ServingConfig, progress: bool = False) -> int:
    """Stores the small thumbnails of images, so a server need not create them. Returns how many images failed."""
    threads = config.max_concurrent_fetches
    failures = 0
    with (
        Thumbnails(folder, config) as thumbnails,
        ThreadPoolExecutor(threads, thread_name_prefix="thumbnails") as pool,
        progress_bar("thumbnails", len(uris), "images", progress) as bar,
    ):
        for start in range(0, len(uris), _BATCH):
            batch = uris[start : start + _BATCH]
            failures += sum(not created for created in pool.map(thumbnails.create_ahead, batch))
            bar.update(len(batch))
    return failures


def remove_thumbnails(folder: Path, uris: Iterable[str]) -> None:
    """Removes the stored thumbnails of images."""
    for uri in uris:
        for scope in ("all", "public"):
            for size in _PREPROCESSING:
                _choose_path(folder, scope, size, uri).unlink(missing_ok=True)


def _read_stored(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    os.utime(path)  # `prune` removes the least recently used thumbnails
    return content
