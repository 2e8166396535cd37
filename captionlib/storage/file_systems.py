"""Opens the one file system that an address names, and refuses chains of file systems.

fsspec joins file systems by `::` (`zip://a.jpg::https://host/a.zip`), and some of them interpret what they read: a file
of `reference://` names further addresses. An address then decides what is opened, downloaded and evaluated. Addresses
here name a single file system that returns the bytes that are stored. Nothing else in captionlib hands an address to
`fsspec.open` or `fsspec.core.url_to_fs`.
"""

import os
import re
from typing import Any

import fsspec
from fsspec.core import OpenFile, get_compression
from fsspec.registry import get_filesystem_class, known_implementations, registry

from captionlib.errors import ConfigError

__all__ = ["INTERPRETING_PROTOCOLS", "is_chained", "is_known", "open_file_system", "open_unpacked", "split_protocol"]

INTERPRETING_PROTOCOLS = frozenset(
    {
        *("reference", "simplecache", "filecache", "blockcache", "cached", "zip", "tar", "libarchive", "dir"),
        *("generic", "async_wrapper", "asyncwrapper", "data", "git", "github", "gist", "dvc", "dask"),
        *("jupyter", "jlab", "pyscript"),
    }
)
"""Protocols of file systems that interpret content, wrap another file system, or run a program."""

_PREFIX = re.compile(r"(?P<protocol>[a-z][a-z0-9+._-]*)(?P<separator>://|::)", re.IGNORECASE)


def split_protocol(address: str) -> tuple[str, str]:
    """The protocol of an address in lower case, and the address with its protocol in lower case.

    The protocol of a path is empty. A path may contain `::`, unless a known protocol is in front of it.
    """
    match = _PREFIX.match(address)
    if match is None:
        return "", address
    protocol = match["protocol"].lower()
    if match["separator"] == "::" and not is_known(protocol):
        return "", address
    return protocol, protocol + address[len(protocol) :]


def is_known(protocol: str) -> bool:
    """Whether fsspec knows a protocol, though a package that it needs may not be installed."""
    return protocol in known_implementations or protocol in registry


def is_chained(address: str) -> bool:
    """Whether fsspec would chain file systems. `::` in a URL of http(s), in a key or in a path is no chain."""
    protocol, address = split_protocol(address)
    if not protocol:
        return False
    if address.startswith(f"{protocol}::"):
        return True
    if protocol in ("http", "https"):
        return False
    return any("://" in part or is_known(part) for part in address.split("::")[1:])


def open_file_system(address: str | os.PathLike[str], **options: Any) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path as that file system spells it.

    Args:
        address: a path or an address.
        options: of the file system; they come before those that the address implies.

    Raises:
        ConfigError: the address is chained, its protocol is unknown or interprets content, or a package is missing.
    """
    given = os.fspath(address)
    protocol, url = split_protocol(given)
    if is_chained(given):
        raise ConfigError(
            f"{given} chains file systems by `::`; expected a path or the address of one file system; "
            "download or unpack it first, and give the path"
        )
    if protocol in INTERPRETING_PROTOCOLS:
        raise ConfigError(
            f"{given} cannot be opened: {protocol} interprets what it reads; expected a path or an address such as "
            "s3://bucket/folder; download or unpack it first, and give the path"
        )
    try:
        file_system = get_filesystem_class(protocol or "file")
        implied = file_system._get_kwargs_from_urls(url) if protocol else {}
        return fsspec.filesystem(protocol or "file", **{**implied, **options}), file_system._strip_protocol(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{given} cannot be opened: {error}") from error


def open_unpacked(fs: Any, path: str, mode: str = "rb", **text: Any) -> Any:
    """A context manager that opens a file and decompresses `.gz`, `.bz2`, `.xz` and what else fsspec knows by its end.

    Args:
        fs: an fsspec file system.
        path: on it.
        mode: `rb` or `rt`.
        text: `encoding`, `errors` and `newline` of a text file.
    """
    return OpenFile(fs, path, mode, compression=get_compression(path, "infer"), **text)
