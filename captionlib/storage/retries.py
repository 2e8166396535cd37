"""Retries requests to file systems after temporary errors.

Object store clients give up after a second or two. The retries in this module continue for two minutes, so that an
endpoint can restart, or a bucket can stop throttling its clients.
"""

import errno
import io
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tenacity import RetryError, Retrying, retry_if_exception, stop_after_delay, wait_exponential, wait_random

from captionlib.errors import CaptionlibError, StorageError
from captionlib.storage.remote_errors import (
    get_http_status,
    is_connection_error,
    is_temporary_error,
    is_timeout_error,
)

__all__ = ["RangedFile", "call_with_retries", "convert_os_errors", "find_file_type"]

Result = TypeVar("Result")

_MAX_SECONDS = 120.0
_FIRST_WAIT_SECONDS = 0.5

_retrying = Retrying(
    retry=retry_if_exception(is_temporary_error),
    stop=stop_after_delay(_MAX_SECONDS),
    # The random jitter spreads out the retries of workers that failed at the same time.
    wait=wait_exponential(_FIRST_WAIT_SECONDS, max=15) + wait_random(0, _FIRST_WAIT_SECONDS),
)


def call_with_retries(address: str, action: Callable[[], Result]) -> Result:
    """Calls `action` and returns its result.

    Retries temporary errors for two minutes, with exponential backoff of up to 15 seconds between attempts. `action`
    must be idempotent.

    Raises:
        FileNotFoundError: the file does not exist.
        NotADirectoryError: a part of the path is a file.
        StorageError: the storage refused the request, or failed with a temporary error for two minutes.
    """

    def attempt() -> Result:
        try:
            return action()
        except FileNotFoundError as error:  # fsspec raises it for every failure of a web server, not only for 404
            cause = error.__cause__
            if (
                cause is not None and getattr(cause, "errno", None) == socket.EAI_NONAME
            ):  # probably a typing error, so not retried
                with convert_os_errors(address):
                    raise cause from None
            if cause is not None and _is_server_failure(cause):
                raise cause from None
            raise

    try:
        with convert_os_errors(address):
            return _retrying(attempt)
    except RetryError as error:
        reason = error.last_attempt.exception()
        raise StorageError(
            f"{address}: the storage failed for {_MAX_SECONDS:.0f} seconds, most recently with "
            f"{type(reason).__name__}: {reason}; run the same command again later to resume"
        ) from reason


def _is_server_failure(error: BaseException) -> bool:
    return is_connection_error(error) or is_timeout_error(error) or get_http_status(error) not in (None, 404, 410)


@contextmanager
def convert_os_errors(address: str) -> Iterator[None]:
    """Converts OSErrors and HTTP errors that the block raises to StorageErrors whose messages contain `address`.

    FileNotFoundError and NotADirectoryError are not converted.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, CaptionlibError, RetryError):
        raise
    except Exception as error:
        if not isinstance(error, OSError) and get_http_status(error) is None:
            raise
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"{address} cannot be accessed: {reason}; fix the problem and run the same command again"
        ) from error


def find_file_type(fs: Any, path: str) -> str | None:
    """Returns `file`, `directory` or `other`, or None if there is no file. On the web, directories are lists of links.

    fsspec's `exists`, `isfile` and `isdir` instead take many failures of the storage for a missing file.
    """

    def request() -> str:
        fs.invalidate_cache()
        try:
            info = fs.info(path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # no file can have this name
                raise FileNotFoundError(path) from None
            raise
        except ValueError:  # the name contains a null character or a lone surrogate
            raise FileNotFoundError(path) from None
        is_list_of_links = info.get("mimetype") == "text/html" and fs.isdir(path)
        return "directory" if is_list_of_links else str(info["type"])

    try:
        return call_with_retries(path, request)
    except (FileNotFoundError, NotADirectoryError):
        return None


class RangedFile(io.RawIOBase):
    """A remote file. Each read fetches exactly the requested bytes in one request, with retries.

    There is no read-ahead, because Parquet readers request what they need. Each thread has its own file position.
    """

    def __init__(self, fs: Any, path: str) -> None:
        super().__init__()
        self._fs = fs
        self._path = path
        self._size = int(call_with_retries(path, lambda: fs.size(path)))
        self._thread = threading.local()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return getattr(self._thread, "position", 0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._size}[whence]
        self._thread.position = start + offset
        return self.tell()

    def read(self, size: int | None = -1) -> bytes:
        start = self.tell()
        end = self._size if size is None or size < 0 else min(start + size, self._size)
        content = call_with_retries(self._path, lambda: self._read_range(start, end)) if end > start else b""
        self._thread.position = start + len(content)
        return content

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _read_range(self, start: int, end: int) -> bytes:
        content: bytes = self._fs.cat_file(self._path, start=start, end=end)
        if len(content) != end - start:
            raise ConnectionError(f"expected bytes {start} to {end} of {self._path}, got {len(content)} bytes")
        return content
