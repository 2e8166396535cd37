"""Small pictures of the images that an index names: fetched and decoded when they are first looked at, then kept."""

import hashlib
import os
import threading
import time
from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from captionlib.data.images.decoder_pool import DecoderConfig, DecoderPool
from captionlib.data.images.decoding import Preprocessing
from captionlib.data.images.encoding import encode_jpeg
from captionlib.data.images.fetching import FetchConfig, ImageFetcher
from captionlib.errors import BusyError, DecodeError, FetchError, ImageError
from captionlib.serving.config import ServingConfig
from captionlib.storage.folders import write_file

__all__ = ["Size", "Thumbnails"]

Size = Literal["small", "large"]

# Pixels of the shorter side, and of the square that is cut out: of a small one the middle, of a large one nearly all.
_SIZES: dict[Size, tuple[int, int]] = {"small": (256, 256), "large": (640, 1280)}
_REMEMBER_FAILURES_SECONDS = 60.0
_MOST_FAILURES = 10_000
_PRUNE_EVERY = 200


class Thumbnails:
    """Gives JPEG bytes by address. A context manager; safe to use from many threads.

    Args:
        folder: where they are kept, by a hash of address, size and allowed hosts.
        config: its limits.
    """

    def __init__(self, folder: Path, config: ServingConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._max_bytes = config.thumbnail_bytes
        self._scope = "all" if config.allow_private_hosts else "public"  # a kept picture must not outlast a refusal
        self._opened = ExitStack()
        fetching = FetchConfig(
            timeout_seconds=config.image_timeout_seconds, attempts=2, allow_private_hosts=config.allow_private_hosts
        )
        decoding = DecoderConfig(timeout_seconds=config.image_timeout_seconds, max_image_pixels=config.max_image_pixels)
        self._fetcher = self._opened.enter_context(ImageFetcher(fetching))
        self._decoders = {
            size: self._opened.enter_context(DecoderPool(_preprocessing(*pixels), decoding))
            for size, pixels in _SIZES.items()
        }
        self._slots = threading.BoundedSemaphore(config.max_photos)
        self._lock = threading.Lock()
        self._failures: OrderedDict[str, tuple[float, ImageError]] = OrderedDict()
        self._made = 0

    def __enter__(self) -> "Thumbnails":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def get(self, uri: str, size: Size) -> bytes:
        """A picture.

        Args:
            uri: of the image, as its dataset has it; never as a visitor has it.
            size: how large.

        Raises:
            ImageError: it cannot be had; that is remembered for a while.
            BusyError: too many are asked for at once.
        """
        name = hashlib.sha256(f"{self._scope} {size} {uri}".encode()).hexdigest()
        path = self._folder / name[:2] / f"{name}.jpg"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return self._make(uri, size, path)
        os.utime(path)  # the ones looked at last are kept
        return content

    def shrink(self, content: bytes, size: Size) -> bytes:
        """A picture of an image file; it is not kept.

        Raises:
            DecodeError: it is no image, or one that is not allowed.
        """
        pixels = self._decoders[size].decode(content)
        return encode_jpeg(_trim(pixels) if size == "large" else pixels)

    def _make(self, uri: str, size: Size, path: Path) -> bytes:
        self._recall_failure(path.name)
        if not self._slots.acquire(timeout=5.0):
            raise BusyError("too many images at once; try again")
        try:
            content = self.shrink(self._fetcher.fetch(uri), size)
        except (FetchError, DecodeError) as error:
            self._remember_failure(path.name, error)
            raise
        finally:
            self._slots.release()
        write_file(path, content)
        self._count()
        return content

    def _recall_failure(self, name: str) -> None:
        with self._lock:
            until, error = self._failures.get(name, (0.0, None))
        if error is not None and time.monotonic() < until:
            raise error

    def _remember_failure(self, name: str, error: ImageError) -> None:
        with self._lock:
            self._failures[name] = (time.monotonic() + _REMEMBER_FAILURES_SECONDS, error)
            if len(self._failures) > _MOST_FAILURES:
                self._failures.popitem(last=False)

    def _count(self) -> None:
        with self._lock:
            self._made += 1
            due = self._made % _PRUNE_EVERY == 0
        if due:
            self.prune()

    def prune(self) -> None:
        """Removes the pictures that were not looked at for longest, until the others fit."""
        files = []
        for path in self._folder.rglob("*.jpg"):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            files.append((found.st_mtime, found.st_size, path))
        excess = sum(size for _, size, _ in files) - self._max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def _preprocessing(resize: int, crop: int) -> Preprocessing:
    return Preprocessing(resize, crop, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def _trim(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Without the black that the decoder puts around an image that is smaller than its square."""
    rows, columns = (np.flatnonzero(pixels.any(axis=axes)) for axes in ((1, 2), (0, 2)))
    if not len(rows):
        return pixels
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
