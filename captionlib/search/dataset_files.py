"""The files of one dataset as a file system that DuckDB can read, and that holds nothing else."""

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from fsspec.spec import AbstractFileSystem

from captionlib.storage.ranged_file import RangedFile
from captionlib.storage.retries import call_with_retries

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

    def open(self, path: str, mode: str = "rb", **_options: Any) -> RangedFile:
        if mode not in ("r", "rb"):
            raise PermissionError(f"{path}: the dataset is read only")
        return RangedFile(self._fs, self._real(path))  # of a local one too: threads of DuckDB share it

    def info(self, path: str, **_options: Any) -> dict[str, Any]:
        real = self._real(path)
        return {"name": path, "type": "file", "size": call_with_retries(real, lambda: self._fs.size(real))}

    def exists(self, path: str, **_options: Any) -> bool:
        return self._address(path) in self._paths

    def glob(self, path: str, **_options: Any) -> list[str]:
        return [path] if self.exists(path) else []

    def modified(self, path: str) -> datetime:
        real = self._real(path)
        try:
            changed: datetime = call_with_retries(real, lambda: self._fs.modified(real))
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
