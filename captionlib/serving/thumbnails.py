"""Creates thumbnails of the images in an index on first access, and stores them on disk."""

import hashlib
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from cachetools import TTLCache

from captionlib.data.images.decoder_pool import DecoderConfig, DecoderPool
from captionlib.data.images.decoding import Preprocessing
from captionlib.data.images.encoding import encode_jpeg
from captionlib.data.images.fetching import FetchConfig, ImageFetcher
from captionlib.errors import BusyError, ImageError
from captionlib.serving.config import ServingConfig
from captionlib.storage.folders import write_file

__all__ = ["ThumbnailSize", "Thumbnails"]

ThumbnailSize = Literal["small", "large"]

# Sizes of the shorter side and the square crop, in pixels. `small` is a center crop, `large` nearly the whole image.
_PREPROCESSING: dict[ThumbnailSize, Preprocessing] = {
    "small": Preprocessing(256, 256, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "large": Preprocessing(640, 1280, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_FAILURE_SECONDS = 60.0
_MAX_FAILURES = 10_000
_PRUNE_EVERY = 200
_WAIT_SECONDS = 5.0


class Thumbnails:
    """Creates thumbnails and stores them as JPEG files in a folder. This context manager is thread-safe."""

    def __init__(self, folder: Path, config: ServingConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._max_bytes = config.max_thumbnail_bytes
        # Part of file names, so that a server that may not access private hosts shows no thumbnails from one that may.
        self._scope = "all" if config.allow_private_hosts else "public"
        self._resources = ExitStack()
        fetching = FetchConfig(
            timeout_seconds=config.image_timeout_seconds, attempts=2, allow_private_hosts=config.allow_private_hosts
        )
        decoding = DecoderConfig(timeout_seconds=config.image_timeout_seconds, max_image_pixels=config.max_image_pixels)
        self._fetcher = self._resources.enter_context(ImageFetcher(fetching))
        self._decoders = {
            size: self._resources.enter_context(DecoderPool(preprocessing, decoding))
            for size, preprocessing in _PREPROCESSING.items()
        }
        self._slots = threading.BoundedSemaphore(config.max_concurrent_images)
        self._lock = threading.Lock()
        self._failures: TTLCache[str, ImageError] = TTLCache(_MAX_FAILURES, _FAILURE_SECONDS)
        self._stored = 0

    def __enter__(self) -> "Thumbnails":
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def get(self, uri: str, size: ThumbnailSize) -> bytes:
        """Returns the thumbnail of an image. `uri` must come from a dataset, not from a visitor.

        Raises:
            ImageError: the image cannot be read; the error is cached for a minute.
            BusyError: too many thumbnails are being created.
        """
        name = hashlib.sha256(f"{self._scope} {size} {uri}".encode()).hexdigest()
        path = self._folder / name[:2] / f"{name}.jpg"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return self._fetch(uri, size, path)
        os.utime(path)  # `prune` removes the least recently used thumbnails
        return content

    def make(self, content: bytes, size: ThumbnailSize) -> bytes:
        """Creates a thumbnail of an image file without storing it."""
        pixels = self._decoders[size].decode(content).pixels
        return encode_jpeg(_crop_padding(pixels) if size == "large" else pixels)

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

    def _fetch(self, uri: str, size: ThumbnailSize, path: Path) -> bytes:
        with self._lock:
            failure = self._failures.get(path.name)
        if failure is not None:
            raise failure
        if not self._slots.acquire(timeout=_WAIT_SECONDS):
            raise BusyError("too many images at once; try again")
        try:
            content = self.make(self._fetcher.fetch(uri), size)
        except ImageError as error:
            with self._lock:
                self._failures[path.name] = error
            raise
        finally:
            self._slots.release()
        write_file(path, content)
        with self._lock:
            self._stored += 1
            is_prune_due = self._stored % _PRUNE_EVERY == 0
        if is_prune_due:
            self.prune()
        return content


def _crop_padding(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Removes the black padding that the decoder adds to images smaller than the crop."""
    rows, columns = (np.flatnonzero(pixels.any(axis=axes)) for axes in ((1, 2), (0, 2)))
    if not len(rows):
        return pixels
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
