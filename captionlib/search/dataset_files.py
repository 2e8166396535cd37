"""The files of one dataset as a file system that DuckDB can read, and that holds nothing else."""

import os
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from fsspec.spec import AbstractFileSystem

__all__ = ["DatasetFiles"]


class DatasetFiles(AbstractFileSystem):  # type: ignore[misc]
    """Maps names to files of another file system, read only; whatever is not named does not exist.

    DuckDB sees `dataset://captions/part-00000.parquet`, wherever that file lies: there is nothing to write to, no
    folder to list, and no character of a real path that DuckDB could take for a pattern.
    """

    protocol = "dataset"
    cachable = False

    def __init__(self, fs: Any, paths: Mapping[str, str]) -> None:
        """Shows `paths`, from name to path in `fs`."""
        super().__init__()
        self._fs = fs
        self._paths = {f"{self.protocol}://{name}": path for name, path in paths.items()}

    @property
    def addresses(self) -> list[str]:
        """The names as DuckDB is to spell them."""
        return list(self._paths)

    def open(self, path: str, mode: str = "rb", **_options: Any) -> "_DatasetFile":
        if mode not in ("r", "rb"):
            raise PermissionError(f"{path}: the dataset is read only")
        return _DatasetFile(self._fs, self._real(path))

    def info(self, path: str, **_options: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": self._fs.size(self._real(path))}

    def exists(self, path: str, **_options: Any) -> bool:
        return self._address(path) in self._paths

    def glob(self, path: str, **_options: Any) -> list[str]:
        return [path] if self.exists(path) else []

    def modified(self, path: str) -> datetime:
        try:
            changed: datetime = self._fs.modified(self._real(path))
        except NotImplementedError:
            return datetime.fromtimestamp(0, timezone.utc)
        return changed

    def _address(self, path: str) -> str:
        return path if "://" in path else f"{self.protocol}://{path}"

    def _real(self, path: str) -> str:
        try:
            return self._paths[self._address(path)]
        except KeyError:
            raise FileNotFoundError(f"{path} is no file of the dataset") from None


class _DatasetFile:
    """A file with a position of its own in every thread: DuckDB's threads share a file and seek before each read."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        self._path = path
        self._size: int = fs.size(path)
        self._thread = threading.local()

    def read(self, size: int = -1) -> bytes:
        start = self.tell()
        end = self._size if size < 0 else min(start + size, self._size)
        content: bytes = self._fs.cat_file(self._path, start=start, end=end) if end > start else b""
        self._thread.position = start + len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._size}[whence]
        self._thread.position = start + offset
        return start + offset

    def tell(self) -> int:
        return getattr(self._thread, "position", 0)

    def close(self) -> None:
        """Nothing is held open."""
