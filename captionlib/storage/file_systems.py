"""Opens the file system of an address (a local path or a URL) and rejects unsafe addresses.

Untrusted addresses could make fsspec open arbitrary files or run code. fsspec chains file systems with `::`
(`zip://a.jpg::https://host/a.zip`). Some file systems interpret the files that they read: a `reference://` file lists
further addresses to open. In captionlib, an address refers to a single file system that returns the stored bytes. No
other module passes an address to `fsspec.open` or `fsspec.core.url_to_fs`.
"""

import os
import re
from typing import Any

import fsspec
from fsspec.core import OpenFile, get_compression
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import get_filesystem_class, known_implementations, registry

from captionlib.errors import ConfigError

__all__ = [
    "UNSAFE_PROTOCOLS",
    "is_chained",
    "is_known_protocol",
    "open_decompressed",
    "open_file_system",
    "split_protocol",
    "strip_local_protocol",
]

UNSAFE_PROTOCOLS = frozenset(
    {
        *("reference", "simplecache", "filecache", "blockcache", "cached", "zip", "tar", "libarchive", "dir"),
        *("generic", "async_wrapper", "asyncwrapper", "data", "git", "github", "gist", "dvc", "dask"),
        *("jupyter", "jlab", "pyscript"),
    }
)
"""Protocols of file systems that interpret content, wrap another file system or run a program."""

_PREFIX = re.compile(r"(?P<protocol>[a-z][a-z0-9+._-]*)(?P<separator>://|::)", re.IGNORECASE)
_DATA_URI = re.compile(r"data:[a-z0-9/+.;=-]*,", re.IGNORECASE)


def split_protocol(address: str) -> tuple[str, str]:
    """Returns the protocol of an address in lower case, and the address with its protocol in lower case.

    The protocol of a local path is an empty string. `NAME::REST` is also a local path, unless NAME is a known protocol.
    """
    if _DATA_URI.match(address):
        return "data", address
    match = _PREFIX.match(address)
    if match is None:
        return "", address
    protocol = match["protocol"].lower()
    if match["separator"] == "::" and not is_known_protocol(protocol):
        return "", address
    return protocol, protocol + address[len(protocol) :]


def strip_local_protocol(url: str) -> str:
    """Returns the absolute path of a local path or of a `file:` URL. The path is not percent-decoded."""
    protocol, url = split_protocol(url)
    if protocol:
        host, slash, path = url[len(protocol) + len("://") :].partition("/")
        if host not in ("", "localhost"):
            raise ConfigError(
                f"expected {protocol}:///PATH, a file on this machine, got the host {host!r} in {url!r:.200}"
            )
        url = slash + path
    return str(LocalFileSystem._strip_protocol(url))


def is_known_protocol(protocol: str) -> bool:
    """Returns whether fsspec lists a protocol, even if the package that implements it is not installed."""
    return protocol in known_implementations or protocol in registry


def is_chained(address: str) -> bool:
    """Returns whether fsspec would chain several file systems to open an address.

    A `::` in a web URL or a local path is an ordinary part of the name. In other URLs, it chains file systems if a
    known protocol or a URL follows it.
    """
    protocol, address = split_protocol(address)
    if not protocol:
        return False
    if address.startswith(f"{protocol}::"):
        return True
    if protocol in ("http", "https"):
        return False
    return any("://" in part or is_known_protocol(part) for part in address.split("::")[1:])


def open_file_system(address: str | os.PathLike[str], **options: Any) -> tuple[Any, str]:
    """Returns the fsspec file system of a local path or a URL, and the path within that file system.

    `options` are passed to the file system. They override options that the address contains, such as a host or a port.

    Raises:
        ConfigError: the address is empty, unsafe or not supported.
    """
    given = os.fspath(address)
    protocol, url = split_protocol(given)
    if not given:
        raise ConfigError("expected a path or URL, got an empty string, perhaps from a variable that is not set")
    if is_chained(given):
        raise ConfigError(
            f"{given} chains file systems with `::`; expected a path or the address of one file system; "
            "download or unpack the file first, and use its path"
        )
    if protocol in UNSAFE_PROTOCOLS:
        raise ConfigError(
            f"{given} cannot be opened: {protocol} is an unsafe protocol; expected a path or an address such as "
            "s3://bucket/folder; download or unpack the file first, and use its path"
        )
    try:
        file_system = get_filesystem_class(protocol or "file")
        url_options = file_system._get_kwargs_from_urls(url) if protocol else {}
        path = strip_local_protocol(url) if file_system is LocalFileSystem else file_system._strip_protocol(url)
        return fsspec.filesystem(protocol or "file", **{**url_options, **options}), path
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{given} cannot be opened: {error}") from error


def open_decompressed(fs: Any, path: str, mode: str = "rb", **text_options: Any) -> Any:
    """Returns a context manager that opens a file and decompresses it according to its extension, such as `.gz`.

    For a text file, pass mode `rt`. `text_options` are `encoding`, `errors` and `newline`, as for the built-in `open`.
    """
    return OpenFile(fs, path, mode, compression=get_compression(path, "infer"), **text_options)
