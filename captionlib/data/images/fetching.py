"""The bytes of an image, by its address: bounded in size and time, with retries where they can help.

What an address may be, and which are refused, is documented in `captionlib.data.images.addresses`. Credentials and
endpoints are fsspec's own configuration; see `captionlib.storage`.
"""

import asyncio
import os
import threading
import time
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.http import HTTPFileSystem
from tenacity import (
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from captionlib import __version__
from captionlib.data.images.addresses import (
    IMAGE_PROTOCOLS,
    ImageFile,
    check_protocols,
    open_image_file,
    open_image_file_system,
    open_regular_file,
    parse_image_address,
)
from captionlib.data.images.fetch_errors import to_fetch_error
from captionlib.data.images.parquet_cells import ParquetCellReader
from captionlib.data.images.public_hosts import is_refusal, refuse_proxies
from captionlib.errors import ConfigError, FetchError
from captionlib.storage.remote_errors import get_http_status, is_temporary_error

__all__ = ["FetchConfig", "ImageFetcher"]

_PIECE_BYTES = 2**20
_LONGEST_BACKOFF_SECONDS = 30.0
_USER_AGENT = f"captionlib/{__version__}"  # some hosts refuse clients that do not say what they are


@dataclass(frozen=True)
class FetchConfig:
    """What fetching an image may take.

    Attributes:
        max_image_bytes: larger files are refused; never more than this is read of one.
        timeout_seconds: for one attempt, from connecting to the last byte.
        attempts: how often a fetch is tried that times out, is cut off or is put off by the server.
        backoff_seconds: before the second attempt; doubled before each further one, plus a random part.
        max_row_group_bytes: images in Parquet files come by the row group; how much of them is kept.
        protocols: that addresses may have; `file` also allows paths. A protocol that interprets what it reads, or that
            chains file systems, is never allowed.
        allow_private_hosts: whether http and https may connect to hosts that are not public: loopback, link-local and
            private networks. Turn it off where strangers choose the addresses and see the images.
    """

    max_image_bytes: int = 64 * 2**20
    timeout_seconds: float = 30.0
    attempts: int = 4
    backoff_seconds: float = 0.5
    max_row_group_bytes: int = 2**30
    protocols: tuple[str, ...] = IMAGE_PROTOCOLS
    allow_private_hosts: bool = True

    def __post_init__(self) -> None:
        for name in ("max_image_bytes", "attempts", "max_row_group_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.timeout_seconds <= 0:
            raise ConfigError(f"timeout_seconds: expected more than 0, got {self.timeout_seconds}")
        if self.backoff_seconds < 0:
            raise ConfigError(f"backoff_seconds: expected at least 0, got {self.backoff_seconds}")
        check_protocols(self.protocols)


class _Span(NamedTuple):
    """Which bytes of a file: `end` is excluded; None: all, which `most` bounds."""

    start: int
    end: int | None
    most: int


class ImageFetcher:
    """Fetches images, from many threads at once. A context manager; what is being fetched at its end is given up."""

    def __init__(self, config: FetchConfig | None = None) -> None:
        self.config = config or FetchConfig()
        self._allow_private_hosts = self.config.allow_private_hosts
        if not self._allow_private_hosts:
            for protocol in ("http", "https"):
                refuse_proxies(fsspec.config.conf.get(protocol, {}))
        self._row_groups = ParquetCellReader(self._open, self.config.max_row_group_bytes, self.config.timeout_seconds)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._requests: set[Future[bytes]] = set()
        self._retrying = Retrying(
            retry=retry_if_exception(lambda error: is_temporary_error(error) and not self._closed.is_set()),
            stop=stop_after_attempt(self.config.attempts),
            wait=wait_exponential(self.config.backoff_seconds, max=_LONGEST_BACKOFF_SECONDS)
            + wait_random(0, self.config.backoff_seconds),
            sleep=sleep_using_event(self._closed),
            reraise=True,
        )

    def __enter__(self) -> "ImageFetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives up what other threads are fetching or waiting to fetch again."""
        self._closed.set()
        with self._lock:
            for request in self._requests:
                request.cancel()

    def fetch(self, uri: str) -> bytes:
        """The bytes at an address.

        Raises:
            FetchError: they cannot be read; its reason is such as BadAddress, ForbiddenHost, FileNotFoundError,
                `HTTP 404`, TooLarge or Timeout. Its message quotes nothing that was read.
        """
        try:
            content: bytes = self._retrying(self._attempt, uri)
        except FetchError:
            raise
        except CancelledError:
            raise FetchError("Cancelled", "the run ended before the image was there") from None
        except Exception as error:  # file systems raise whatever their clients do, and this is one image of millions
            raise to_fetch_error(error) from error
        return content

    def _attempt(self, uri: str) -> bytes:
        if self._closed.is_set():
            raise CancelledError
        try:
            return self._read_address(uri)
        except Exception as error:
            if is_refusal(error):
                raise FetchError(
                    "ForbiddenHost",
                    "the address, or one that it redirects to, leads to a host that is not public; expected a public "
                    "host; allow private hosts (loading.fetch.allow_private_hosts, serve --allow-private-hosts) if you "
                    "trust the source of the addresses",
                ) from error
            raise

    def _read_address(self, uri: str) -> bytes:
        most = self.config.max_image_bytes
        address = parse_image_address(uri, self.config.protocols)
        if address.cell is not None:
            return self._row_groups.read_cell(address.file, *address.cell, most)
        if address.span is not None:
            span = _Span(*address.span, most)
            return _complete(self._read(address.file, _checked(span)), span)
        content = self._read(address.file, _Span(0, None, most))
        if len(content) > most:
            raise FetchError("TooLarge", f"expected at most {most} bytes, got more")
        return content

    def _open(self, file: ImageFile) -> BinaryIO:
        return open_image_file(file, self._allow_private_hosts)

    def _read(self, file: ImageFile, span: _Span) -> bytes:
        """The bytes of a span, or one more than its `most` where the file has more."""
        if file.is_path:
            return _read_local(file.url, span)
        fs, path = open_image_file_system(file, self._allow_private_hosts)
        if file.protocol == "file":
            return _read_local(path, span)
        if isinstance(fs, HTTPFileSystem):
            return self._run(fs, self._get(fs, path, span))
        if issubclass(type(fs), AsyncFileSystem) and fs.async_impl:
            return self._run(fs, _cat(fs, path, span))
        return _read_opened(fs, path, span, time.monotonic() + self.config.timeout_seconds)

    def _run(self, fs: Any, reading: Any) -> bytes:
        """Runs a coroutine on the file system's own thread, for as long as an attempt may take."""
        limited = asyncio.wait_for(reading, self.config.timeout_seconds)
        with self._lock:
            request: Future[bytes] = asyncio.run_coroutine_threadsafe(limited, fs.loop)
            self._requests.add(request)
        if self._closed.is_set():
            request.cancel()
        try:
            return request.result()
        finally:
            with self._lock:
                self._requests.discard(request)

    async def _get(self, fs: Any, url: str, span: _Span) -> bytes:
        """A GET that stops reading where the span ends, whatever the server makes of the range asked for."""
        session = await fs.set_session()
        headers = {"User-Agent": _USER_AGENT, **session.headers, **fs.kwargs.get("headers", {})}
        headers["Accept-Encoding"] = "identity"  # sizes are those of the file
        if span.end is not None:
            headers["Range"] = f"bytes={span.start}-{span.end - 1}"
        options = {**fs.kwargs, "headers": headers, "timeout": aiohttp.ClientTimeout(self.config.timeout_seconds)}
        async with session.get(fs.encode_url(url), **options) as response:
            response.raise_for_status()
            skip = 0 if response.status == 206 else span.start
            wanted = span.most + 1 if span.end is None else span.end - span.start
            if span.end is None and (response.content_length or 0) > span.most:
                raise FetchError("TooLarge", f"expected at most {span.most} bytes, got {response.content_length}")
            content = bytearray()
            async for piece in response.content.iter_any():
                content += piece[skip:]
                skip = max(0, skip - len(piece))
                if len(content) >= wanted:
                    break
            return bytes(content[:wanted])


async def _cat(fs: Any, path: str, span: _Span) -> bytes:
    """A ranged read of an object store."""
    try:
        content: bytes = await fs._cat_file(path, start=span.start, end=span.end or span.most + 1)
    except Exception as error:
        if span.end is None and get_http_status(error) == 416:  # every range is beyond an empty object
            return b""
        raise
    return content


def _read_opened(fs: Any, path: str, span: _Span, deadline: float) -> bytes:
    """Reads piece by piece: a file system without coroutines cannot be interrupted in the middle of one."""
    wanted = span.most + 1 if span.end is None else span.end - span.start
    content = bytearray()
    with fs.open(path, "rb") as file:
        file.seek(span.start)
        while len(content) < wanted and (piece := file.read(min(_PIECE_BYTES, wanted - len(content)))):
            content += piece
            if time.monotonic() > deadline:
                raise TimeoutError
    return bytes(content)


def _read_local(path: str, span: _Span) -> bytes:
    with open_regular_file(path) as file:
        end = min(os.fstat(file.fileno()).st_size, span.most + 1) if span.end is None else span.end
        return os.pread(file.fileno(), end - span.start, span.start)


def _checked(span: _Span) -> _Span:
    size = (span.end or 0) - span.start
    if size < 1:
        raise FetchError("BadRange", f"expected bytes=START-END with END above START, got {span.start}-{span.end}")
    if size > span.most:
        raise FetchError("TooLarge", f"expected at most {span.most} bytes, got a range of {size}")
    return span


def _complete(content: bytes, span: _Span) -> bytes:
    if span.end is not None and len(content) < span.end - span.start:
        raise FetchError("ShortRead", f"expected bytes {span.start} to {span.end}, but the file ends before")
    return content
