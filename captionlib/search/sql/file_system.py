"""A read-only file system for DuckDB that contains only the files of one dataset."""

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from fsspec.spec import AbstractFileSystem

from captionlib.storage.retries import RangedFile, call_with_retries

__all__ = ["DatasetFileSystem"]


class DatasetFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Exposes the given files of an underlying file system under new names, read-only.

    DuckDB reads `dataset://captions/part-00000.parquet`, wherever the file is stored. It cannot write files or list
    folders, and does not interpret characters of the actual path as a glob pattern.
    """

    protocol = "dataset"
    cachable = False

    def __init__(self, fs: Any, paths: Mapping[str, str]) -> None:
        """Exposes `paths`, a mapping of names to paths in `fs`."""
        super().__init__()
        self._fs = fs
        self._paths = {f"{self.protocol}://{name}": path for name, path in paths.items()}

    @property
    def addresses(self) -> list[str]:
        """The addresses under which DuckDB opens the files."""
        return list(self._paths)

    def open(self, path: str, mode: str = "rb", **_options: Any) -> RangedFile:
        if mode not in ("r", "rb"):
            raise PermissionError(f"{path}: the dataset is read-only")
        return RangedFile(self._fs, self._resolve(path))  # also if local: DuckDB reads one file from several threads

    def info(self, path: str, **_options: Any) -> dict[str, Any]:
        actual = self._resolve(path)
        return {"name": path, "type": "file", "size": call_with_retries(actual, lambda: self._fs.size(actual))}

    def exists(self, path: str, **_options: Any) -> bool:
        return self._to_address(path) in self._paths

    def glob(self, path: str, **_options: Any) -> list[str]:
        return [path] if self.exists(path) else []

    def modified(self, path: str) -> datetime:
        actual = self._resolve(path)
        try:
            modified: datetime = call_with_retries(actual, lambda: self._fs.modified(actual))
        except NotImplementedError:
            return datetime.fromtimestamp(0, timezone.utc)
        return modified

    def _to_address(self, path: str) -> str:
        return path if "://" in path else f"{self.protocol}://{path}"

    def _resolve(self, path: str) -> str:
        try:
            return self._paths[self._to_address(path)]
        except KeyError:
            raise FileNotFoundError(f"{path} is not a file of the dataset") from None
