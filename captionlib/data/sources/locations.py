"""Finds and reads the files of an input dataset. Addresses are paths, URLs, globs or brace lists (`{a,b}.csv`)."""

import contextlib
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem

from captionlib.data.sources.globs import expand_braces, filter_files, filter_folders, find_wildcard
from captionlib.data.sources.values import parse_json
from captionlib.errors import DatasetError
from captionlib.storage.file_systems import open_decompressed, open_file_system, split_protocol
from captionlib.storage.retries import call_with_retries, find_file_type

__all__ = [
    "Location",
    "find_files",
    "find_image_root",
    "get_extension",
    "get_uncompressed_extension",
    "is_glob",
    "list_folder",
    "load_json",
    "locate",
    "locate_all",
    "open_file",
    "read_lines",
    "resolve_uri",
    "scan_folder",
    "split_glob",
]

_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class Location:
    """A file or a folder on an fsspec file system."""

    fs: Any
    path: str  # within `fs`
    address: str  # absolute path or URL, for output and messages

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Location":
        return Location(self.fs, self.path.rpartition("/")[0], self.address.rpartition("/")[0])

    def find_type(self) -> str | None:
        """Returns `file`, `directory` or `other`, or None if the file does not exist."""
        return find_file_type(self.fs, self.path)

    def require(self, expected: str = "a file, a folder or a glob") -> "Location":
        """Returns the location, or raises DatasetError if it does not exist."""
        if self.find_type() is None:
            raise DatasetError(f"{self.address} does not exist; expected {expected}")
        return self

    def join(self, relative: str) -> "Location":
        return Location(self.fs, f"{self.path}/{relative}", f"{self.address}/{relative}") if relative else self


def locate(address: str | os.PathLike[str]) -> Location:
    """Resolves a path or a URL to a location, whether or not it exists. Raises ConfigError if it is not supported."""
    address = os.fspath(address)
    fs, path = open_file_system(address)
    if isinstance(fs, LocalFileSystem):
        path = os.path.normpath(path).replace("//", "/").rstrip("/")  # normpath keeps two slashes at the start
        return Location(fs, path, path)
    return Location(fs, path.rstrip("/"), address.rstrip("/"))


def locate_all(address: str | os.PathLike[str]) -> list[Location]:
    """Resolves an address to locations. Expands braces unless a file with exactly this name exists."""
    location, expanded = locate(address), expand_braces(os.fspath(address))
    return [location] if len(expanded) == 1 or location.find_type() else list(map(locate, expanded))


def resolve_uri(uri: str, root: str) -> str:
    """Strips white space from `uri` and, if it is a relative path, prepends `root`."""
    uri = uri.strip()
    return uri if uri.startswith("/") or "://" in uri or split_protocol(uri)[0] else f"{root}/{uri}"


def find_image_root(image_root: str | None, source: Location) -> str:
    """Returns the folder that image paths are relative to: `image_root` or, by default, the folder of `source`."""
    return locate(image_root).address if image_root is not None else source.parent.address


def get_extension(name: str) -> str:
    """Returns the extension in lower case, such as `.jpg` for `a/B.JPG`; empty for `a/b` and `.b`."""
    name = name.rsplit("/", 1)[-1]
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def get_uncompressed_extension(name: str) -> str:
    """Returns the extension, ignoring compression and query: `.csv` for `a.csv.gz` and `https://x.org/a.csv?v=2`."""
    name = name.partition("?")[0].lower()
    for compressed in (".gz", ".bz2", ".xz"):
        name = name.removesuffix(compressed)
    return get_extension(name)


def is_glob(location: Location) -> bool:
    """Returns whether a path contains wildcards. HTTP URLs (`?` starts a query) and existing files are not globs."""
    is_web = split_protocol(location.address)[0] in ("http", "https")
    return not is_web and find_wildcard(location.path) is not None and location.find_type() is None


def split_glob(location: Location) -> tuple[Location, str]:
    """Splits a glob before its first wildcard: `images/*/a*.jpg` becomes `images` and `*/a*.jpg`."""
    parts, first = location.path.split("/"), find_wildcard(location.path)
    pattern = "/".join(parts[first:])
    return Location(location.fs, "/".join(parts[:first]), location.address[: -len(pattern) - 1]), pattern


def find_files(addresses: Sequence[str], extensions: frozenset[str]) -> Iterator[Location]:
    """Yields the files at the given addresses, and the files with one of `extensions` in folders.

    Raises:
        DatasetError: an address does not exist, or no file is found at it.
    """
    for address in addresses:
        for location in locate_all(address):
            if is_glob(location):
                yield from _match_glob(location)
            elif location.find_type() == "directory":
                yield from _find_in_folder(location, extensions)
            else:
                yield location.require()


def scan_folder(folder: Location) -> Iterator[tuple[str, str | None, Any]]:
    """Yields the name, kind and details of each entry of a folder, in arbitrary order.

    The kind is `file` or `directory`, or None for other entries. The details are an `os.DirEntry` if the folder is
    local, and otherwise a dictionary from fsspec.
    """
    if folder.is_local:
        # A listing by fsspec would take about a kilobyte of memory per file.
        with os.scandir(folder.path or "/") as entries:
            for entry in entries:
                yield entry.name, "directory" if entry.is_dir() else "file" if entry.is_file() else None, entry
        return
    for details in folder.fs.ls(folder.path, detail=True):
        path = details["name"].rstrip("/")
        if path != folder.path:
            yield path.rsplit("/", 1)[-1], details["type"], details
    folder.fs.invalidate_cache()  # otherwise the listings of a whole tree stay in memory


def _match_glob(location: Location) -> list[Location]:
    """Lists the files that match a glob. Raises StorageError if a folder cannot be listed; fsspec would skip it."""
    root, glob = split_glob(location)
    matches, may_contain_matches = filter_files(glob), filter_folders(glob)
    found: list[str] = []
    pending = [""]
    while pending:
        folder = pending.pop()
        for name, kind, details in list_folder(root.join(folder)):
            path = f"{folder}/{name}" if folder else name
            if matches(path):
                found.append(path)
            is_link = root.is_local and details.is_symlink()  # may point to a parent folder
            if kind == "directory" and not is_link and may_contain_matches(path):
                pending.append(path)
    if not found:
        raise DatasetError(f"{location.address}: no file matches")
    return [root.join(path) for path in sorted(found)]


def list_folder(folder: Location) -> list[tuple[str, str | None, Any]]:
    """Returns the entries of a folder; see `scan_folder`. The list is empty if the folder does not exist.

    Raises:
        StorageError: the storage failed or refused the request.
    """
    try:
        return call_with_retries(folder.path, lambda: list(scan_folder(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _find_in_folder(folder: Location, extensions: frozenset[str]) -> list[Location]:
    files = (name for name, kind, _ in list_folder(folder) if kind == "file" and not name.startswith((".", "_")))
    matches = sorted(name for name in files if get_uncompressed_extension(name) in extensions)
    if not matches:
        raise DatasetError(f"{folder.address}: expected files with {' or '.join(sorted(extensions))}, got none")
    return [folder.join(name) for name in matches]


@contextlib.contextmanager
def open_file(location: Location, decompress: bool = False) -> Iterator[BinaryIO]:
    """Opens a file for reading. If `decompress` is true, files that end in .gz, .bz2 or .xz are decompressed.

    Raises:
        DatasetError: the file cannot be opened, or reading it inside the `with` block fails.
    """
    try:
        opened = open_decompressed(location.fs, location.path) if decompress else location.fs.open(location.path, "rb")
        with opened as file:
            yield file
    except _READ_ERRORS as error:
        raise DatasetError(f"{location.address} cannot be read: {error or repr(error)}; check the file") from error


def read_lines(location: Location) -> Iterator[str]:
    """Yields the lines of a UTF-8 text file, including their line endings but without a byte order mark.

    Files that end in .gz, .bz2 or .xz are decompressed.

    Raises:
        DatasetError: the file cannot be read, is damaged, or is not UTF-8.
    """
    number = 0
    try:
        with open_decompressed(location.fs, location.path, "rt", encoding="utf-8-sig", newline="") as file:
            for line in file:
                number += 1
                yield line
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{location.address}, after line {number}: not UTF-8 ({error.reason}); convert it to UTF-8"
        ) from error
    except _READ_ERRORS as error:
        raise DatasetError(
            f"{location.address}, after line {number}: cannot be read: {error or repr(error)}"
        ) from error


def load_json(location: Location) -> Any:
    return parse_json("".join(read_lines(location)), location.address)
