"""Reads and writes folders on any file system that fsspec supports. Files are written atomically.

Credentials, endpoints and timeouts come from fsspec's own configuration: environment variables such as
`FSSPEC_S3_ENDPOINT_URL`, or files in `~/.config/fsspec`. Requests that fail with a temporary error are retried for two
minutes; see `captionlib.storage.retries`.
"""

import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from captionlib.errors import ConfigError, StorageError
from captionlib.storage.file_systems import open_file_system, split_protocol
from captionlib.storage.remote_errors import get_http_status, is_temporary_error
from captionlib.storage.retries import RangedFile, call_with_retries, convert_os_errors, find_file_type

__all__ = [
    "TEMPORARY_FOLDER",
    "Addresses",
    "Folder",
    "convert_full_disk_errors",
    "list_addresses",
    "resolve_address",
    "scratch_folder",
    "stage_file",
    "write_file",
]

Addresses = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A path or URL, or several."""

TEMPORARY_FOLDER = "__temporary"

# A PUT on these file systems is atomic, so files can be uploaded without a temporary name.
_ATOMIC_PUT = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"})

_FULL_DISK_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # full, quota, read-only, file too large

_FILES_PER_BATCH = 1000  # for `read_many`, which holds the files of one batch in memory


@dataclass(init=False, unsafe_hash=True)
class Folder:
    """A folder at a local path or a URL. It pickles as an absolute path or URL, so that workers can open it."""

    uri: str

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.uri = os.fspath(uri).rstrip("/") or os.fspath(uri)[:1]  # the root folder remains `/`

    def __reduce__(self) -> tuple[type["Folder"], tuple[str]]:
        return Folder, (resolve_address(self.uri),)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        try:
            self.uri.encode()  # addresses are stored in JSON and Parquet as UTF-8
        except UnicodeEncodeError as error:
            raise ConfigError(f"{self.uri!a}: expected a name in UTF-8; rename the folder") from error
        return open_file_system(self.uri)

    @property
    def fs(self) -> Any:
        return self._opened[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def _has_atomic_put(self) -> bool:
        return split_protocol(self.uri)[0] in _ATOMIC_PUT

    def path(self, name: str) -> str:
        """Returns the path of a file within the file system, or of the folder if `name` is empty."""
        return f"{self._opened[1].rstrip('/')}/{name}".rstrip("/")

    def address(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def list(self, subfolder: str = "") -> list[str]:
        """Returns the sorted names in the folder or in a subfolder, or an empty list if the folder does not exist."""
        folder = self.path(subfolder)

        def list_paths() -> list[str]:
            self.fs.invalidate_cache()
            paths: list[str] = self.fs.ls(folder, detail=False)
            self.fs.invalidate_cache()  # cached listings take about 1 kB of memory per file
            return paths

        try:
            paths = [path.rstrip("/") for path in call_with_retries(folder, list_paths)]
        except FileNotFoundError:
            return []
        return sorted(path.rsplit("/", 1)[-1] for path in paths if path != folder)

    def exists(self, name: str) -> bool:
        """Returns whether there is a file or a folder with this name. If a web server answers 403, returns False."""
        try:
            return find_file_type(self.fs, self.path(name)) is not None
        except StorageError as error:
            # A public bucket that cannot be listed answers 403 for a missing file.
            if split_protocol(self.uri)[0] in ("http", "https") and get_http_status(error) == 403:
                return False
            raise

    def fetch_version(self, name: str) -> str:
        """Returns a string that changes whenever the file is replaced. Does not read the file."""
        path = self.path(name)

        def fetch() -> str:
            self.fs.invalidate_cache()
            return str(self.fs.ukey(path))

        return call_with_retries(path, fetch)

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading. Each read of a remote file fetches only the requested bytes."""
        path = self.path(name)
        if not self.is_local:
            return cast(BinaryIO, RangedFile(self.fs, path))
        with convert_os_errors(path):
            return Path(path).open("rb")

    def read(self, name: str) -> bytes:
        path = self.path(name)
        return cast(bytes, call_with_retries(path, lambda: self.fs.cat_file(path)))

    def read_many(self, names: Iterable[str]) -> Iterator[bytes]:
        """Yields the contents of small files in any order. Skips missing files. Reads remote files concurrently."""
        paths = map(self.path, names)
        while remaining := list(islice(paths, _FILES_PER_BATCH)):
            while remaining:
                contents, remaining = call_with_retries(remaining[0], partial(_read_batch, self.fs, remaining))
                yield from contents

    def download(self, name: str, local_path: Path) -> None:
        path = self.path(name)
        call_with_retries(path, lambda: self.fs.get_file(path, str(local_path)))

    def write(self, name: str, content: bytes) -> None:
        with self.stage(name) as path, convert_os_errors(self.path(name)):
            path.write_bytes(content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a small file unless it exists, and returns whether it was written.

        If several processes create the same file at once, one succeeds. On object stores other than S3, several may
        succeed, and the file of the last one remains.
        """
        path = self.path(name)
        try:
            if not self.is_local:
                self.fs.invalidate_cache()
                self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                self.fs.pipe_file(path, content, mode="create")
                return True
            parent = Path(self.path(TEMPORARY_FOLDER))
            with _create_temporary_file(parent, Path(name).name) as temporary:
                with convert_os_errors(path):
                    temporary.write_bytes(content)
                os.link(temporary, path)
            with suppress(OSError):  # the folder contains other temporary files
                parent.rmdir()
            return True
        except FileExistsError:
            return False

    @contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        """Yields a local path to write. Publishes the file as `name` when the block ends without an exception."""
        if self.is_local:
            parent = Path(self.path(TEMPORARY_FOLDER))
            with convert_full_disk_errors(self.path(name)), _create_temporary_file(parent, Path(name).name) as path:
                try:
                    yield path
                    with convert_os_errors(self.path(name)):
                        self._publish_local(path, Path(self.path(name)))
                except FileNotFoundError as error:
                    if path.exists():
                        raise
                    raise StorageError(
                        f"{self.uri} was removed or moved while {name} was being written; run the same command again"
                    ) from error
        else:
            with scratch_folder() as scratch:
                path = scratch / Path(name).name
                yield path
                self._publish_remote(path, name)

    def remove_temporary_files(self) -> None:
        """Removes temporary files of crashed runs. On a local file system, files of running processes are kept."""
        if not self.is_local:
            self.remove(TEMPORARY_FOLDER)
            return
        folder = Path(self.path(TEMPORARY_FOLDER))
        for name in self.list(TEMPORARY_FOLDER):
            with suppress(OSError), (path := folder / name).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises BlockingIOError if a process is writing it
                path.unlink()
        with suppress(OSError):
            folder.rmdir()

    def _publish_local(self, path: Path, destination: Path) -> None:
        with path.open("rb") as written:
            os.fsync(written.fileno())
        destination.parent.mkdir(parents=True, exist_ok=True)
        path.replace(destination)
        directory = os.open(destination.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # makes the rename survive a crash
        finally:
            os.close(directory)

    def _publish_remote(self, path: Path, name: str) -> None:
        if self._has_atomic_put:
            call_with_retries(self.path(name), lambda: self.fs.put_file(str(path), self.path(name)))
            return
        temporary = self.path(f"{TEMPORARY_FOLDER}/{path.name}.{uuid.uuid4().hex}")

        def publish() -> None:
            self.fs.makedirs(temporary.rsplit("/", 1)[0], exist_ok=True)
            self.fs.makedirs(self.path(name).rsplit("/", 1)[0], exist_ok=True)
            self.fs.put_file(str(path), temporary)
            try:
                self.fs.mv(temporary, self.path(name))
            except FileNotFoundError as error:  # a run that finished at the same time removed the temporary files
                raise ConnectionError(f"{temporary} was removed") from error

        call_with_retries(self.path(name), publish)

    def move(self, old_name: str, new_name: str) -> None:
        """Renames a file, if it exists, and replaces any file with the new name. On object stores, copies the file."""
        old, new = self.path(old_name), self.path(new_name)
        if self.is_local:
            try:
                self._publish_local(Path(old), Path(new))
            except FileNotFoundError:
                if Path(old).exists():
                    raise
            return

        def move() -> None:
            with suppress(FileNotFoundError):
                (self.fs.cp_file if self._has_atomic_put else self.fs.mv)(old, new)

        call_with_retries(new, move)

    def remove(self, name: str) -> None:
        """Removes a file or a subfolder, if it exists."""
        path = self.path(name)
        while self.is_local and Path(path).is_dir():
            with suppress(FileNotFoundError), convert_os_errors(path):  # another process may remove the same files
                shutil.rmtree(path)

        def remove() -> None:
            self.fs.invalidate_cache()
            with suppress(FileNotFoundError):
                self.fs.rm(path, recursive=True)

        call_with_retries(path, remove)

    def remove_file(self, name: str) -> None:
        """Removes a file with a single request, if it exists."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                self.fs.rm_file(self.path(name))

        call_with_retries(self.path(name), remove)

    def remove_if_equal(self, name: str, content: bytes) -> None:
        """Removes a file if its content equals `content`.

        Local files are locked, so that no process removes a file that another process has just created.
        """
        if not self.is_local:
            with suppress(FileNotFoundError):
                if self.read(name) == content:
                    self.remove_file(name)
            return
        path = Path(self.path(name))
        with suppress(FileNotFoundError), convert_os_errors(str(path)), path.open("rb") as file:
            with suppress(OSError):  # the file system has no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.read_bytes() == content:
                path.unlink()


@contextmanager
def _create_temporary_file(folder: Path, name: str) -> Iterator[Path]:
    """Yields the path of a new file, which is removed when the block ends and locked until then."""
    while True:
        with convert_os_errors(str(folder)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except FileExistsError:  # also raised if another process removes the folder meanwhile
                if folder.is_file():
                    raise
        path = folder / f"{name}.{uuid.uuid4().hex}"
        try:
            with convert_os_errors(str(path)):
                file = path.open("xb")
        except FileNotFoundError:  # another process removed the folder
            continue
        with file:
            with suppress(OSError):  # the file system has no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not path.exists():  # another process removed the file before it was locked
                continue
            try:
                yield path
            finally:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            return


@contextmanager
def convert_full_disk_errors(address: str) -> Iterator[None]:
    """Converts OSErrors about a full or read-only disk to StorageErrors. Their messages contain `address`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK_ERRNO:
            with convert_os_errors(address):
                raise
        raise


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Creates a folder for temporary files on this machine, and removes it when the block ends."""
    with tempfile.TemporaryDirectory(prefix="captionlib-") as path, convert_full_disk_errors(path):
        yield Path(path)


def _read_batch(fs: Any, paths: list[str]) -> tuple[list[bytes], list[str]]:
    """Returns the contents of the files that were read, and the paths of the files to read again."""
    results = fs.cat_ranges(paths, None, None, on_error="return")
    contents = [result for result in results if isinstance(result, bytes)]
    errors = {
        path: result
        for path, result in zip(paths, results, strict=True)
        if not isinstance(result, bytes | FileNotFoundError)
    }
    permanent = [error for error in errors.values() if not is_temporary_error(error)]
    if errors and (permanent or not contents):
        raise [*permanent, *errors.values()][0]
    return contents, list(errors)


def list_addresses(addresses: Addresses) -> list[str | os.PathLike[str]]:
    return [addresses] if isinstance(addresses, str | os.PathLike) else list(addresses)


def resolve_address(address: str | os.PathLike[str]) -> str:
    """Makes a local path absolute, for processes with a different working directory. URLs are returned unchanged."""
    fs, path = open_file_system(address)
    return str(path) if isinstance(fs, LocalFileSystem) else os.fspath(address)


def write_file(address: str | os.PathLike[str], content: bytes) -> None:
    with stage_file(address) as path:
        path.write_bytes(content)


@contextmanager
def stage_file(address: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a local path to write. Publishes the file at `address` when the block ends without an exception."""
    fs, path = open_file_system(address)
    try:
        if isinstance(fs, LocalFileSystem):
            destination = Path(path)
            destination.parent.mkdir(parents=True, exist_ok=True)
            with _create_partial_file(destination) as staged:
                yield staged
                staged.replace(destination)
        else:
            with scratch_folder() as scratch:
                staged = scratch / "file"
                yield staged
                call_with_retries(path, lambda: fs.put_file(str(staged), path))
    except OSError as error:
        raise StorageError(f"{os.fspath(address)} cannot be written: {error.strerror or error}") from error


@contextmanager
def _create_partial_file(destination: Path) -> Iterator[Path]:
    """Yields the path of a file beside `destination`, and removes the file when the block ends.

    It overwrites `NAME.partial`, the file of a killed process, unless another process is writing that file.
    """
    with ExitStack() as stack:
        for suffix in (".partial", f".{uuid.uuid4().hex}.partial"):
            path = destination.with_name(f"{destination.name}{suffix}")
            file = stack.enter_context(path.open("ab"))
            with suppress(OSError):  # another process has the lock, or the file system has no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):  # no other process has moved the file
                    break
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
