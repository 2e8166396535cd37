"""A read-only remote file without read-ahead."""

import io
import os
import threading
from typing import Any

from captionlib.storage.retries import call_with_retries

__all__ = ["RangedFile"]


class RangedFile(io.RawIOBase):
    """A remote file that fetches exactly the bytes of each read in one request, with retries.

    Parquet readers know which bytes they need, so read-ahead would be wasted. Each thread has its own position, so that
    threads can share a file and seek before each read.
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
