"""A read-only file system for DuckDB that contains only the files of the queried datasets."""

import os
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from captionlib.storage.retries import RangedFile, call_with_retries, convert_os_errors

__all__ = ["DatasetFile", "DatasetFileSystem"]

_MAX_OPEN_FILES = 512  # operating systems often allow a process 1,024


class DatasetFile(NamedTuple):
    """A file system, and the path of a file in it."""

    fs: Any
    path: str


class DatasetFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Exposes files of other file systems at addresses such as `dataset://captions/part-00000.parquet`, read-only.

    DuckDB cannot list folders, and does not interpret characters of the actual path as a glob pattern. DuckDB opens a
    file several times in one query. This class opens a local file only once, so that a query reads one version of it,
    even if the file is replaced.
    """

    protocol = "dataset"
    cachable = False

    def __init__(self, files: Mapping[str, DatasetFile]) -> None:
        super().__init__()
        self._files = files
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the local files. They cannot be read afterwards."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def open(self, path: str, mode: str = "rb", **_options: Any) -> RangedFile:
        if mode not in ("r", "rb"):
            raise PermissionError(f"{path}: the dataset is read-only")
        fs, actual_path = self._resolve(path)
        descriptor = self._open_once(fs, actual_path)
        return RangedFile(fs, actual_path) if descriptor is None else _OpenFile(fs, actual_path, descriptor)

    def _open_once(self, fs: Any, path: str) -> int | None:
        """Returns the descriptor of a local file, or None if the file is remote or too many files are open."""
        with self._lock:
            if path not in self._descriptors:
                if not isinstance(fs, LocalFileSystem) or len(self._descriptors) >= _MAX_OPEN_FILES:
                    return None
                with convert_os_errors(path):
                    self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]

    def info(self, path: str, **_options: Any) -> dict[str, Any]:
        fs, actual_path = self._resolve(path)
        descriptor = self._open_once(fs, actual_path)
        if descriptor is None:
            size = call_with_retries(actual_path, lambda: fs.size(actual_path))
        else:
            size = os.fstat(descriptor).st_size
        return {"name": path, "type": "file", "size": size}

    def exists(self, path: str, **_options: Any) -> bool:
        return self._to_address(path) in self._files

    def glob(self, path: str, **_options: Any) -> list[str]:
        return [path] if self.exists(path) else []

    def modified(self, path: str) -> datetime:
        fs, actual_path = self._resolve(path)
        try:
            modified: datetime = call_with_retries(actual_path, lambda: fs.modified(actual_path))
        except NotImplementedError:
            return datetime.fromtimestamp(0, timezone.utc)
        return modified

    def _to_address(self, path: str) -> str:
        return path if "://" in path else f"{self.protocol}://{path}"

    def _resolve(self, path: str) -> DatasetFile:
        try:
            return self._files[self._to_address(path)]
        except KeyError:
            raise FileNotFoundError(f"{path} is not a file of the dataset") from None


class _OpenFile(RangedFile):
    """A local file that is already open."""

    def __init__(self, fs: Any, path: str, descriptor: int) -> None:
        super().__init__(fs, path)
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    def _read_range(self, start: int, end: int) -> bytes:
        with convert_os_errors(self._path):
            return os.pread(self._descriptor, end - start, start)
