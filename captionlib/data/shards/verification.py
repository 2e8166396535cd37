"""Reads data files, and compares each block with its checksum in the marker (the file that completes a shard)."""

import threading
from collections.abc import Iterable
from typing import Any

from captionlib.data.shards.markers import BLOCK_BYTES, Marker, compute_block_checksum
from captionlib.errors import DamagedShardError
from captionlib.storage.retries import RangedFile

__all__ = ["VerifiedFile"]

_MAX_CACHED_BYTES = 4 * BLOCK_BYTES
_CHECKSUM_DIGITS = len(compute_block_checksum(b""))


class VerifiedFile(RangedFile):
    """A data file whose bytes are verified before they are returned.

    Args:
        fs: fsspec file system.
        path: path of the file within `fs`.
        versions: markers of the shard versions that the file may belong to. The file must match one of them.

    Raises:
        DamagedShardError: the file matches none of the versions. This is raised when the file is opened or read.
    """

    def __init__(self, fs: Any, path: str, versions: Iterable[Marker]) -> None:
        super().__init__(fs, path)
        versions = list(versions)
        self._matching_versions = [version for version in versions if version.bytes == self._size]
        self._lock = threading.Lock()
        self._cached = (0, b"")  # offset and bytes of the last read, because readers often continue in the same block
        if not self._matching_versions:
            expected = " or ".join(str(version.bytes) for version in versions)
            raise DamagedShardError(f"expected {expected} bytes, got {self._size}")

    def _read_range(self, start: int, end: int) -> bytes:
        first = start - start % BLOCK_BYTES
        begin, content = self._cached
        if not begin <= start <= end <= begin + len(content):
            begin = first
            content = self._read_blocks(first, min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, self._size))
            self._verify(first, content)
            if len(content) <= _MAX_CACHED_BYTES:
                self._cached = begin, content
        return content[start - begin : end - begin]

    def _read_blocks(self, start: int, end: int) -> bytes:
        try:
            return super()._read_range(start, end)
        except ConnectionError:
            if (size := self._fs.size(self._path)) != self._size:
                raise DamagedShardError(f"expected {self._size} bytes, got {size}") from None
            raise

    def _verify(self, start: int, content: bytes) -> None:
        view = memoryview(content)
        actual = "".join(
            compute_block_checksum(view[offset : offset + BLOCK_BYTES]) for offset in range(0, len(view), BLOCK_BYTES)
        )
        position = start // BLOCK_BYTES * _CHECKSUM_DIGITS
        with self._lock:
            self._matching_versions = [
                version
                for version in self._matching_versions
                if not version.blocks or version.blocks[position : position + len(actual)] == actual
            ]
            if not self._matching_versions:
                raise DamagedShardError(f"bytes {start} to {start + len(content)} differ from their checksums")
