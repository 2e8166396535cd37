"""Finds and opens the files that sources are made of: paths, addresses, globs and brace lists."""

import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from captionlib.errors import DatasetError
from captionlib.storage.file_systems import open_decompressed, open_file_system

__all__ = [
    "IMAGE_EXTENSIONS",
    "Location",
    "expand_braces",
    "find_files",
    "find_image_root",
    "get_extension",
    "get_text_extension",
    "is_pattern",
    "load_json",
    "locate",
    "read_lines",
    "resolve_uri",
    "scan_folder",
    "split_pattern",
]

# What a person would call a picture; those that cannot be decoded end as failures, with their reason.
IMAGE_EXTENSIONS = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm"),
    }
)

_MAGIC = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Location:
    """A file or a folder.

    Attributes:
        fs: its fsspec file system.
        path: as that file system spells it.
        address: as a manifest spells it: an absolute path, or an address.
    """

    fs: Any
    path: str
    address: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Location":
        return Location(self.fs, self.path.rpartition("/")[0], self.address.rpartition("/")[0])

    def join(self, relative: str) -> "Location":
        return Location(self.fs, f"{self.path}/{relative}", f"{self.address}/{relative}") if relative else self


def locate(address: str | os.PathLike[str]) -> Location:
    """Where an address leads.

    Raises:
        ConfigError: the address chains file systems, or its file system is unknown, refused or not installed; see
            `captionlib.storage.file_systems`.
    """
    address = os.fspath(address)
    fs, path = open_file_system(address)
    if isinstance(fs, LocalFileSystem):
        path = os.path.normpath(path)
        return Location(fs, path.rstrip("/"), path.rstrip("/"))
    return Location(fs, path.rstrip("/"), address.rstrip("/"))


def resolve_uri(uri: str, root: str) -> str:
    """A uri as it is, or, where it is a relative path, below `root`."""
    return uri if uri.startswith("/") or "://" in uri else f"{root}/{uri}"


def find_image_root(images: str | None, source: Location) -> str:
    """What the relative paths in a source are relative to: the folder that was given, or the source's own."""
    return locate(images).address if images is not None else source.parent.address


def get_extension(name: str) -> str:
    """`.jpg` of `a/B.JPG`, nothing of `a/b` and `.b`."""
    name = name.rsplit("/", 1)[-1]
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def get_text_extension(name: str) -> str:
    """`.csv` of `a.csv`, of `a.csv.gz` and of `https://example.org/a.csv?version=2`."""
    name = name.partition("?")[0].lower()
    for compressed in (".gz", ".bz2", ".xz"):
        name = name.removesuffix(compressed)
    return get_extension(name)


def is_pattern(location: Location) -> bool:
    """Whether a path is a glob; a web address with a query and a file whose name has brackets are none."""
    protocols = (location.fs.protocol,) if isinstance(location.fs.protocol, str) else location.fs.protocol
    return bool(_MAGIC.search(location.path)) and "http" not in protocols and not location.fs.exists(location.path)


def split_pattern(location: Location) -> tuple[Location, str]:
    """The folder that a glob starts from, and the rest: `photos` and `*/a*.jpg` of `photos/*/a*.jpg`."""
    parts = location.path.split("/")
    first = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
    pattern = "/".join(parts[first:])
    return Location(location.fs, "/".join(parts[:first]), location.address[: -len(pattern) - 1]), pattern


def expand_braces(address: str) -> list[str]:
    """`a{0..2}.tar` and `{train,val}.csv` written out, in order; leading zeros are kept."""
    found = _BRACES.search(address)
    if found is None:
        return [address]
    if span := _RANGE.fullmatch(found[1]):
        first, last = span.groups()
        width = len(first) if first.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        choices: Iterable[str] = (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))
    else:
        choices = found[1].split(",")
    before, after = address[: found.start()], expand_braces(address[found.end() :])
    return [f"{before}{choice}{rest}" for choice, rest in itertools.product(choices, after)]


def find_files(addresses: Sequence[str], extensions: frozenset[str]) -> Iterator[Location]:
    """The files that addresses name: themselves, what a glob matches, what a folder holds of these extensions.

    Raises:
        DatasetError: an address leads nowhere, or to none of these.
    """
    for address in addresses:
        for spelled in expand_braces(address):
            location = locate(spelled)
            if is_pattern(location):
                yield from _glob(location)
            elif location.fs.isdir(location.path):
                yield from _list(location, extensions)
            elif location.fs.exists(location.path):
                yield location
            else:
                raise DatasetError(f"{location.address} does not exist; expected a file, a folder or a glob")


def scan_folder(folder: Location) -> Iterator[tuple[str, str | None]]:
    """The names in a folder, and what each is: `file`, `directory`, or None for what is neither. In no order."""
    if folder.is_local:
        # Names alone: fsspec's listing keeps about a kilobyte of details a file.
        with os.scandir(folder.path or "/") as entries:
            for entry in entries:
                yield entry.name, "directory" if entry.is_dir() else "file" if entry.is_file() else None
        return
    for details in folder.fs.ls(folder.path, detail=True):
        path = details["name"].rstrip("/")
        if path != folder.path:
            yield path.rsplit("/", 1)[-1], details["type"]
    folder.fs.invalidate_cache()  # else the listings of a whole tree stay in memory


def _glob(location: Location) -> list[Location]:
    root, _ = split_pattern(location)
    paths = sorted(location.fs.glob(location.path))
    if not paths:
        raise DatasetError(f"{location.address}: no file matches")
    return [root.join(path[len(root.path) + 1 :]) for path in paths]


def _list(folder: Location, extensions: frozenset[str]) -> list[Location]:
    files = (name for name, kind in scan_folder(folder) if kind == "file" and not name.startswith((".", "_")))
    kept = sorted(name for name in files if get_text_extension(name) in extensions)
    if not kept:
        raise DatasetError(f"{folder.address}: expected files of {', '.join(sorted(extensions))}, got none")
    return [folder.join(name) for name in kept]


def read_lines(location: Location) -> Iterator[str]:
    """The lines of a UTF-8 text file, with their ends; a byte order mark is dropped, .gz, .bz2 and .xz are unpacked.

    Raises:
        DatasetError: it cannot be read, is damaged, or is not UTF-8.
    """
    number = 0
    try:
        with open_decompressed(location.fs, location.path, "rt", encoding="utf-8-sig", newline="") as file:
            for line in file:
                number += 1  # what was read before an error is told
                yield line
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{location.address}, after line {number}: not UTF-8 ({error.reason}); convert it"
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DatasetError(
            f"{location.address}, after line {number}: cannot be read: {error or repr(error)}"
        ) from error


def load_json(location: Location) -> Any:
    """The content of a JSON file.

    Raises:
        DatasetError: it cannot be read or is no JSON; names the line.
    """
    try:
        return json.loads("".join(read_lines(location)))
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{location.address}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from error
