"""Fetches the bytes of images with retries and with limits on size and time.

`captionlib.data.images.addresses` documents the syntax of addresses. Credentials and endpoints come from fsspec's own
configuration.
"""

import asyncio
import errno
import os
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any, NamedTuple, cast

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.http import HTTPFileSystem
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from captionlib.config import configclass
from captionlib.data.images.addresses import (
    IMAGE_PROTOCOLS,
    MAX_HEADER_BYTES,
    ImageFile,
    open_image_file,
    open_image_file_system,
    open_regular_file,
    parse_image_address,
)
from captionlib.data.images.parquet_cells import ParquetCellReader
from captionlib.data.images.public_hosts import is_private_host_error, reject_proxies
from captionlib.errors import ConfigError, FetchError
from captionlib.storage.file_systems import UNSAFE_PROTOCOLS, is_known_protocol
from captionlib.storage.remote_errors import (
    get_http_status,
    get_retry_after,
    is_connection_error,
    is_temporary_error,
    is_timeout_error,
)

__all__ = ["FetchConfig", "ImageFetcher", "to_fetch_error"]

_CHUNK_BYTES = 2**20
_MAX_BACKOFF_SECONDS = 30.0


@configclass
class FetchConfig:
    """Limits on fetching an image.

    Attributes:
        max_image_bytes: maximum size of an image file. Larger files are rejected.
        timeout_seconds: time limit for one attempt, from connecting to the last byte.
        attempts: maximum number of attempts per image. Only temporary errors, such as timeouts, are retried.
        backoff_seconds: wait before the second attempt. It doubles for each further attempt, up to 30 s, plus jitter.
        max_retry_after_seconds: longest wait that a server can request with the header `Retry-After`. If it requests a
            longer wait, the image fails without another attempt.
        max_column_chunk_bytes: maximum size of a column chunk (a column of a row group) of a Parquet file. It is also
            the size of the cache for column chunks.
        protocols: allowed protocols of image addresses. `file` also allows local paths. Unsafe protocols of fsspec
            are never allowed: those that interpret content (`reference`), wrap another file system (`simplecache`) or
            run a program (`git`).
        allow_private_hosts: allow http and https connections to loopback, link-local and private networks. Set it to
            false if untrusted users can provide addresses and view the images.
    """

    max_image_bytes: PositiveInt = 64 * 2**20
    timeout_seconds: PositiveFloat = 30.0
    attempts: PositiveInt = 4
    backoff_seconds: NonNegativeFloat = 0.5
    max_retry_after_seconds: NonNegativeFloat = 60.0
    max_column_chunk_bytes: PositiveInt = 2**30
    protocols: tuple[str, ...] = IMAGE_PROTOCOLS
    allow_private_hosts: bool = True

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            if protocol in UNSAFE_PROTOCOLS or not is_known_protocol(protocol):
                raise ConfigError(
                    f"protocols: expected fsspec protocols, such as {', '.join(IMAGE_PROTOCOLS)}, got {protocol!r}"
                    ", which is unknown or unsafe; remove it"
                )


class _Span(NamedTuple):
    start: int
    size: int  # of a whole file, one byte more than the limit, to detect files that are too large
    is_whole_file: bool


class ImageFetcher:
    """Fetches images. Thread-safe. As a context manager, it cancels unfinished fetches on exit."""

    def __init__(self, config: FetchConfig | None = None) -> None:
        self.config = config or FetchConfig()
        if not self.config.allow_private_hosts:
            for protocol in ("http", "https"):
                reject_proxies(fsspec.config.conf.get(protocol, {}))
        open_file = partial(open_image_file, allow_private_hosts=self.config.allow_private_hosts)
        self._cells = ParquetCellReader(open_file, self.config.max_column_chunk_bytes)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._requests: set[Future[bytes]] = set()
        backoff = wait_exponential(self.config.backoff_seconds, max=_MAX_BACKOFF_SECONDS)
        jitter = wait_random(0, self.config.backoff_seconds)
        self._retrying = Retrying(
            retry=retry_if_exception(self._may_retry),
            stop=stop_after_attempt(self.config.attempts),
            wait=lambda state: max(backoff(state), _get_requested_wait(state)) + jitter(state),
            sleep=sleep_using_event(self._closed),
            reraise=True,
        )

    def __enter__(self) -> "ImageFetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels all pending requests and prevents further attempts, in all threads."""
        self._closed.set()
        with self._lock:
            for request in self._requests:
                request.cancel()

    def _may_retry(self, error: BaseException) -> bool:
        requested = get_retry_after(error) or 0.0
        within_limit = requested <= self.config.max_retry_after_seconds
        return is_temporary_error(error) and within_limit and not self._closed.is_set()

    def fetch(self, uri: str) -> bytes:
        """Fetches the bytes at an address.

        Raises:
            FetchError: the bytes cannot be fetched. The message does not quote any fetched content.
        """
        try:
            return self._retrying(self._attempt, uri)
        except FetchError:
            raise
        except CancelledError:
            raise FetchError("Cancelled", "the run ended before the image was fetched") from None
        except Exception as error:  # clients may raise any exception; one image must not end the run
            raise to_fetch_error(error) from error

    def _attempt(self, uri: str) -> bytes:
        if self._closed.is_set():
            raise CancelledError
        try:
            return self._read_address(uri)
        except Exception as error:
            if is_private_host_error(error):
                raise FetchError(
                    "ForbiddenHost",
                    "expected a public host, got an address of a private host or a redirect to one; if you trust the "
                    "source of the addresses, allow private hosts (loading.fetch.allow_private_hosts, serve "
                    "--allow-private-hosts)",
                ) from error
            raise

    def _read_address(self, uri: str) -> bytes:
        limit = self.config.max_image_bytes
        address = parse_image_address(uri, self.config.protocols)
        if address.cell is not None:
            return self._cells.read_cell(address.file, *address.cell, limit)
        if address.span is None:
            content = self._read(address.file, _Span(0, limit + 1, is_whole_file=True))
            if len(content) > limit:
                raise FetchError("TooLarge", f"expected at most {limit} bytes, got more")
            return content
        start, end = address.span
        if end <= start:
            raise FetchError("BadRange", f"expected bytes=START-END with END greater than START, got {start}-{end}")
        if end - start > limit:
            raise FetchError("TooLarge", f"expected at most {limit} bytes, got a range of {end - start}")
        content = self._read(address.file, _Span(start, end - start, is_whole_file=False))
        if len(content) < end - start:
            raise FetchError("ShortRead", f"expected bytes {start} to {end}, but the file ends earlier")
        return content

    def _read(self, file: ImageFile, span: _Span) -> bytes:
        if file.protocol == "file":
            return _read_local(file.url, span)
        fs, path = open_image_file_system(file, self.config.allow_private_hosts)
        if isinstance(fs, HTTPFileSystem):
            return self._run(fs, self._read_http(fs, path, span))
        if issubclass(type(fs), AsyncFileSystem) and fs.async_impl:
            return self._run(fs, _read_object(fs, path, span))
        return _read_chunks(fs, path, span, time.monotonic() + self.config.timeout_seconds)

    def _run(self, fs: Any, coroutine: Any) -> bytes:
        limited = asyncio.wait_for(coroutine, self.config.timeout_seconds)
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

    async def _read_http(self, fs: Any, url: str, span: _Span) -> bytes:
        session = await fs.set_session()
        headers = {**session.headers, **fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        if not span.is_whole_file:
            headers["Range"] = f"bytes={span.start}-{span.start + span.size - 1}"
        options = {**fs.kwargs, "headers": headers, "timeout": aiohttp.ClientTimeout(self.config.timeout_seconds)}
        async with await _request(session, fs.encode_url(url), options) as response:
            response.raise_for_status()
            skip = 0 if response.status == 206 else span.start  # the server may ignore the header Range
            if span.is_whole_file and (response.content_length or 0) >= span.size:
                raise FetchError("TooLarge", f"expected at most {span.size - 1} bytes, got {response.content_length}")
            content = bytearray()
            async for chunk in response.content.iter_any():
                content += chunk[skip:]
                skip = max(0, skip - len(chunk))
                if len(content) >= span.size:
                    break
            return bytes(content[: span.size])


async def _request(session: aiohttp.ClientSession, url: str, options: dict[str, Any]) -> aiohttp.ClientResponse:
    try:
        return await session.get(url, **options)
    except aiohttp.TooManyRedirects as error:
        raise FetchError("TooManyRedirects", "expected at most 10 redirects; check the address") from error
    except aiohttp.ClientResponseError as error:
        raise FetchError(
            "BadResponse",
            "expected an HTTP response, got one that is malformed, is compressed in an unsupported encoding, or has a "
            f"header of more than {MAX_HEADER_BYTES} bytes; check the server",
        ) from error


async def _read_object(fs: Any, path: str, span: _Span) -> bytes:
    try:
        return cast(bytes, await fs._cat_file(path, start=span.start, end=span.start + span.size))
    except Exception as error:
        if span.is_whole_file and get_http_status(error) == 416:  # any range of an empty object is invalid
            return b""
        raise


def _read_chunks(fs: Any, path: str, span: _Span, deadline: float) -> bytes:
    """Reads in chunks, and checks the deadline after each, because a synchronous read cannot be interrupted."""
    content = bytearray()
    with fs.open(path, "rb") as file:
        file.seek(span.start)
        while len(content) < span.size and (chunk := file.read(min(_CHUNK_BYTES, span.size - len(content)))):
            content += chunk
            if time.monotonic() > deadline:
                raise TimeoutError
    return bytes(content)


def _read_local(path: str, span: _Span) -> bytes:
    with open_regular_file(path) as file:
        size = min(os.fstat(file.fileno()).st_size, span.size)
        return os.pread(file.fileno(), size, span.start)


def _get_requested_wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return (error and get_retry_after(error)) or 0.0


def to_fetch_error(error: BaseException) -> FetchError:
    """Converts any exception to a FetchError without its message, which may quote the server's response."""
    status = get_http_status(error)
    if status is not None and not isinstance(error, FileNotFoundError | PermissionError):
        return _describe_status(status, get_retry_after(error))
    for matches, reason, problem, remedy in _REASONS:
        if matches(error):
            return FetchError(reason, f"{problem}{_errno_phrase(error)}; {remedy}")
    return FetchError("Unreadable", f"the file cannot be read: {type(error).__name__}{_errno_phrase(error)}")


def _is_instance(*types: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, types)


def _is_invalid_address(error: BaseException) -> bool:
    return isinstance(error, aiohttp.InvalidURL) or getattr(error, "errno", None) in (errno.ENAMETOOLONG, errno.ELOOP)


_REASONS = (
    (_is_instance(FileNotFoundError, NotADirectoryError), "NotFound", "no file at this address", "check the address"),
    (_is_instance(PermissionError), "Forbidden", "no access to the file", "check its permissions or the credentials"),
    (is_timeout_error, "Timeout", "the request timed out", "increase loading.fetch.timeout_seconds"),
    (
        _is_instance(ssl.SSLCertVerificationError, aiohttp.ClientConnectorCertificateError),
        *("BadCertificate", "the certificate of the server is invalid", "check the server or its address"),
    ),
    (
        is_connection_error,
        *("ConnectionFailed", "the connection failed or was interrupted", "retry with --retry-failures"),
    ),
    (_is_invalid_address, "BadAddress", "the address, or one that it redirects to, is invalid", "correct the address"),
)


def _describe_status(status: int, retry_after: float | None) -> FetchError:
    wait = "" if retry_after is None else f" with a request to retry after {retry_after:.0f} seconds"
    reason, remedy = _STATUS_REASONS.get(status) or _STATUS_REASONS[400 if status < 500 else 500]
    return FetchError(reason, f"expected the image, got HTTP status {status}{wait}; {remedy}")


_STATUS_REASONS = {
    **dict.fromkeys((404, 410), ("NotFound", "check the address")),
    **dict.fromkeys((401, 403, 407, 451), ("Forbidden", "check the credentials and the terms of the server")),
    408: ("Timeout", "retry"),
    416: ("BadRange", "the file is shorter than the address says; run `captionlib prepare` again"),
    429: ("TooManyRequests", "retry later with --retry-failures, or reduce loading.threads"),
    400: ("BadRequest", "check the address"),
    500: ("ServerError", "retry later with --retry-failures"),
}


def _errno_phrase(error: BaseException) -> str:
    codes = [getattr(each, "errno", None) for each in (error, getattr(error, "os_error", None))]
    known = [code for code in codes if isinstance(code, int) and code > 0]
    return f": {os.strerror(known[0])}" if known else ""
