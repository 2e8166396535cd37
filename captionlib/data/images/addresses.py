"""Parses, checks and opens image addresses.

Image addresses come from input data, so they are untrusted. An address is a local path or a URL with an allowed
protocol. It may select a part of the file:

    FILE#bytes=START-END        a range of bytes (END is exclusive), such as a member of an uncompressed tar
    FILE#row=N&column=NAME      the bytes in a cell of a Parquet file, with rows counted from 0 over the whole file

If a local file is itself named `/a#row=1&column=b`, this address refers to that file, not to a cell of `/a`. The path
of a `file://` URL is percent-decoded, unless a file exists at the undecoded path.

Chains of file systems (`zip://a::https://b`), and protocols of file systems that interpret the content of files
(`reference://`), are rejected without opening the file.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from captionlib import __version__
from captionlib.errors import ConfigError, FetchError
from captionlib.storage.file_systems import (
    UNSAFE_PROTOCOLS,
    is_chained,
    open_file_system,
    split_protocol,
    strip_local_protocol,
)
from captionlib.storage.retries import find_file_type

__all__ = [
    "IMAGE_PROTOCOLS",
    "MAX_HEADER_BYTES",
    "ImageAddress",
    "ImageFile",
    "image_exists",
    "is_part_address",
    "open_image_file",
    "open_image_file_system",
    "open_regular_file",
    "parse_image_address",
]

IMAGE_PROTOCOLS = ("file", "http", "https", "s3", "gs", "abfs", "hdfs")
"""Protocols that are allowed by default. `file` also allows local paths."""

MAX_HEADER_BYTES = 2**16
"""Size limit of each HTTP header. Some servers send longer headers than aiohttp allows by default."""

_CANONICAL_PROTOCOLS = {"local": "file", "s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs"}

_PART = re.compile(
    r"(?P<file>.+)#(?:bytes=(?P<start>\d{1,18})-(?P<end>\d{1,18})|row=(?P<row>\d{1,18})&column=(?P<column>.+))",
    re.DOTALL,
)
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class ImageFile:
    """A file at an allowed address."""

    protocol: str  # canonical name, such as `s3` for `s3a://` and `file` for a local path
    url: str  # path of a local file, or the complete URL otherwise


@dataclass(frozen=True)
class ImageAddress:
    """An image: a whole file, a span of its bytes (start, end excluded), or a cell of a Parquet file (row, column)."""

    file: ImageFile
    span: tuple[int, int] | None = None
    cell: tuple[int, str] | None = None


def parse_image_address(uri: str, protocols: Sequence[str] = IMAGE_PROTOCOLS) -> ImageAddress:
    """Parses and checks an image address without opening it.

    Raises:
        FetchError: the address is malformed or chains file systems, or its protocol is not allowed.
    """
    match = _match_part(uri)
    if match is None or (not split_protocol(uri)[0] and os.path.lexists(uri)):
        return ImageAddress(_parse_file(uri, protocols))
    file = _parse_file(match["file"], protocols)
    if match["column"] is None:
        return ImageAddress(file, span=(int(match["start"]), int(match["end"])))
    return ImageAddress(file, cell=(int(match["row"]), match["column"]))


def is_part_address(uri: str) -> bool:
    """Returns whether an address has the form `FILE#bytes=...` or `FILE#row=...&column=...`."""
    return _match_part(uri) is not None


def _match_part(uri: str) -> re.Match[str] | None:
    return _PART.fullmatch(uri) if "#" in uri else None


def _parse_file(uri: str, protocols: Sequence[str]) -> ImageFile:
    uri = uri.strip() if "://" in uri else uri
    given_protocol, url = split_protocol(uri)
    protocol = _CANONICAL_PROTOCOLS.get(given_protocol, given_protocol or "file")
    allowed = {_CANONICAL_PROTOCOLS.get(name, name) for name in protocols} - UNSAFE_PROTOCOLS
    problem = _find_problem(uri, protocol, url)
    if not problem and protocol not in allowed:
        problem = (
            f"an address with protocol {', '.join(protocols)}, got {protocol}: {_shorten(uri)}; "
            "if you trust the source of the addresses, add the protocol to loading.fetch.protocols"
        )
    if problem:
        raise FetchError("BadAddress", f"expected {problem}")
    if protocol == "file" and given_protocol:
        try:
            path = strip_local_protocol(url)
        except ConfigError as error:
            raise FetchError("BadAddress", str(error)) from error
        url = path if os.path.lexists(path) else unquote(path, errors="surrogateescape")
    if "\0" in uri + url:
        message = f"expected a path or an address, got {_shorten(uri)}, which contains a null character"
        raise FetchError("BadAddress", message)
    return ImageFile(protocol, url)


def _find_problem(uri: str, protocol: str, url: str) -> str:
    """Returns what is wrong with the form of an address, as `EXPECTED, got ACTUAL`, or an empty string."""
    if is_chained(uri):
        return f"one file system, got a chain of them, {_shorten(uri)}; use the address of the image itself"
    if uri.startswith("//"):
        return f"a path or an address, got {_shorten(uri)}, which lacks a protocol; add https:"
    if protocol == "data":
        return f"a path or an address, got the data URI {_shorten(uri)}; write it to a file"
    if protocol in ("http", "https") and not _has_host(url):
        return f"{protocol}://HOST/PATH, got {_shorten(uri)}"
    return ""


def _shorten(uri: str) -> str:
    return repr(uri if len(uri) <= _SHOWN_CHARACTERS else f"{uri[:_SHOWN_CHARACTERS]}...")


def _has_host(url: str) -> bool:
    try:
        return bool(urlsplit(url).hostname)
    except ValueError:
        return False


def open_image_file_system(file: ImageFile, allow_private_hosts: bool = True) -> tuple[Any, str]:
    """Returns the file system of an image file and its path within that file system; see `open_file_system`.

    Raises:
        FetchError: the package for the protocol is not installed, or the host is not allowed.
    """
    options: dict[str, Any] = {}
    if file.protocol in ("http", "https"):
        options["client_kwargs"] = _create_client_options()
        if not allow_private_hosts:
            from captionlib.data.images.public_hosts import create_public_client

            options["get_client"] = create_public_client
    if not allow_private_hosts and file.protocol == "hdfs" and urlsplit(file.url).netloc:
        raise FetchError(
            "ForbiddenHost",
            "expected an hdfs address of the configured cluster, without a host, got an address with a host; if you "
            "trust the source of the addresses, allow private hosts",
        )
    try:
        return open_file_system(file.url, **options)
    except ConfigError as error:
        raise FetchError("MissingPackage", str(error)) from error


def _create_client_options() -> dict[str, Any]:
    """Returns options for aiohttp's client. The user's fsspec configuration takes precedence."""
    configured: dict[str, Any] = {}
    for protocol in ("http", "https"):
        configured |= fsspec.config.conf.get(protocol, {}).get("client_kwargs") or {}
    limits = dict.fromkeys(("max_line_size", "max_field_size"), MAX_HEADER_BYTES)
    # `identity` prevents compression, so byte ranges and sizes refer to the file itself. Some hosts reject requests
    # without a user agent.
    headers = {"User-Agent": f"captionlib/{__version__}", "Accept-Encoding": "identity"}
    return {**limits, **configured, "headers": {**headers, **(configured.get("headers") or {})}}


def open_image_file(file: ImageFile, allow_private_hosts: bool = True) -> BinaryIO:
    """Opens an image file for random access. Raises FetchError or any exception of its file system."""
    if file.protocol == "file":
        return open_regular_file(file.url)
    fs, path = open_image_file_system(file, allow_private_hosts)
    return cast(BinaryIO, fs.open(path, "rb"))


def open_regular_file(path: str) -> BinaryIO:
    """Opens a local file. Raises FetchError if it is a directory, a pipe or any other special file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without O_NONBLOCK, a named pipe would block
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FetchError("NotAFile", f"expected a regular file, got something else at {path}")
    return os.fdopen(descriptor, "rb")


def image_exists(uri: str, protocols: Sequence[str] = IMAGE_PROTOCOLS) -> bool:
    """Returns whether the file of an image exists. For http and https, returns True without a request.

    Raises:
        FetchError: the address is not allowed.
        StorageError: the storage failed or refused the request.
    """
    file = parse_image_address(uri, protocols).file
    if file.protocol in ("http", "https"):
        return True
    fs, path = (LocalFileSystem(), file.url) if file.protocol == "file" else open_image_file_system(file)
    return find_file_type(fs, path) is not None
