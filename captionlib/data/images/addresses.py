"""Addresses of images: what they may be, and the only way in which they are opened.

An image address comes from data, so from a stranger. It is a path, or the address of one file system whose protocol is
allowed, or one of two forms of it:

    FILE#bytes=START-END        a range of bytes, END excluded: a member of an uncompressed tar
    FILE#row=N&column=NAME      bytes in a row of a Parquet file, counted from 0 over the whole file

Chains of file systems and protocols that interpret content are refused before anything is opened.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from captionlib.errors import ConfigError, FetchError
from captionlib.storage.file_systems import (
    INTERPRETING_PROTOCOLS,
    is_chained,
    is_known,
    open_file_system,
    split_protocol,
)

__all__ = [
    "IMAGE_PROTOCOLS",
    "ImageAddress",
    "ImageFile",
    "check_protocols",
    "image_exists",
    "open_image_file",
    "open_image_file_system",
    "open_regular_file",
    "parse_image_address",
]

IMAGE_PROTOCOLS = ("file", "http", "https", "s3", "gs", "abfs", "hdfs")
"""The protocols that image addresses have unless others are configured; `file` also allows paths."""

_SPELLINGS = {"local": "file", "s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs"}

_RANGE = re.compile(r"(?P<file>.+)#bytes=(?P<start>\d{1,18})-(?P<end>\d{1,18})", re.DOTALL)
_ROW = re.compile(r"(?P<file>.+)#row=(?P<row>\d{1,18})&column=(?P<column>.+)", re.DOTALL)
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class ImageFile:
    """A file at an allowed address.

    Attributes:
        protocol: in its usual spelling: `s3` for `s3a://`, `file` for a path.
        url: the path as given, or the whole address.
        is_path: whether it is a path, without a protocol.
    """

    protocol: str
    url: str
    is_path: bool


@dataclass(frozen=True)
class ImageAddress:
    """An image in a file.

    Attributes:
        file: where its bytes are.
        span: the range of bytes that it is, END excluded.
        cell: the row and the column that it is, of a Parquet file.
    """

    file: ImageFile
    span: tuple[int, int] | None = None
    cell: tuple[int, str] | None = None


def check_protocols(protocols: Sequence[str]) -> None:
    """Checks a list of allowed protocols.

    Raises:
        ConfigError: one of them interprets content, or fsspec does not know it.
    """
    for protocol in protocols:
        if protocol in INTERPRETING_PROTOCOLS:
            raise ConfigError(
                f"protocols: {protocol} interprets what it reads, so it is not safe for addresses of images; expected "
                f"protocols such as {', '.join(IMAGE_PROTOCOLS)}; remove it"
            )
        if not is_known(protocol):
            raise ConfigError(
                f"protocols: expected protocols of fsspec, such as {', '.join(IMAGE_PROTOCOLS)}, got {protocol!r}"
            )


def parse_image_address(uri: str, protocols: Sequence[str] = IMAGE_PROTOCOLS) -> ImageAddress:
    """Parses and checks an address; opens nothing.

    Args:
        uri: the address.
        protocols: the ones that are allowed.

    Raises:
        FetchError: with reason BadAddress: it is malformed or chained, or its protocol is not allowed.
    """
    if match := _ROW.fullmatch(uri):
        return ImageAddress(_parse_file(match["file"], protocols), cell=(int(match["row"]), match["column"]))
    if match := _RANGE.fullmatch(uri):
        return ImageAddress(_parse_file(match["file"], protocols), span=(int(match["start"]), int(match["end"])))
    return ImageAddress(_parse_file(uri, protocols))


def _parse_file(uri: str, protocols: Sequence[str]) -> ImageFile:
    shown = repr(uri if len(uri) <= _SHOWN_CHARACTERS else f"{uri[:_SHOWN_CHARACTERS]}...")
    if "\0" in uri:
        raise FetchError("BadAddress", f"expected a path or an address, got {shown}, which has a null character")
    if is_chained(uri):
        raise FetchError(
            "BadAddress",
            f"expected a path or the address of one file system, got a chain of them, {shown}; "
            "give the address of the image itself",
        )
    spelled, url = split_protocol(uri)
    protocol = _usual(spelled or "file")
    if protocol in INTERPRETING_PROTOCOLS or protocol not in {_usual(allowed) for allowed in protocols}:
        raise FetchError(
            "BadAddress",
            f"expected an address of {', '.join(protocols)}, got {protocol}: {shown}; "
            "where you trust the source of the list, add the protocol to loading.fetch.protocols",
        )
    if protocol in ("http", "https") and not _has_host(url):
        raise FetchError("BadAddress", f"expected {protocol}://HOST/PATH, got {shown}")
    return ImageFile(protocol, url, is_path=not spelled)


def _usual(protocol: str) -> str:
    return _SPELLINGS.get(protocol, protocol)


def _has_host(url: str) -> bool:
    try:
        return bool(urlsplit(url).hostname)
    except ValueError:
        return False


def open_image_file_system(file: ImageFile, allow_private_hosts: bool = True) -> tuple[Any, str]:
    """The file system that a file lies on, and its path there; nothing is read.

    Args:
        file: as `parse_image_address` returned it.
        allow_private_hosts: connect also to hosts that are not public.

    Raises:
        FetchError: the package of the protocol is not installed, or the host is refused.
    """
    options: dict[str, Any] = {}
    if not allow_private_hosts and file.protocol in ("http", "https"):
        from captionlib.data.images.public_hosts import create_public_client

        options["get_client"] = create_public_client
    if not allow_private_hosts and file.protocol == "hdfs" and urlsplit(file.url).netloc:
        raise FetchError(
            "ForbiddenHost",
            "expected an hdfs address without a host, which is that of the configured cluster, got one with a host; "
            "allow private hosts to connect to it",
        )
    try:
        return open_file_system(file.url, **options)
    except ConfigError as error:
        raise FetchError("ImportError", str(error)) from error


def open_image_file(file: ImageFile, allow_private_hosts: bool = True) -> BinaryIO:
    """Opens a file for reading at any position.

    Raises:
        FetchError: it is a directory, a device or a pipe, or cannot be opened by its protocol.
        Exception: what the file system raises.
    """
    if file.is_path:
        return open_regular_file(file.url)
    fs, path = open_image_file_system(file, allow_private_hosts)
    return open_regular_file(path) if file.protocol == "file" else cast(BinaryIO, fs.open(path, "rb"))


def open_regular_file(path: str) -> BinaryIO:
    """Opens a local file, and nothing but a file.

    Raises:
        FetchError: it is something else.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else opening a named pipe waits for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FetchError("NotAFile", f"expected a file, got something else at {path}")
    return os.fdopen(descriptor, "rb")


def image_exists(uri: str, protocols: Sequence[str] = IMAGE_PROTOCOLS) -> bool:
    """Whether the file of an image exists; of a web address it is assumed, without a request.

    Raises:
        FetchError: the address is refused; see `parse_image_address` and `open_image_file_system`.
    """
    file = parse_image_address(uri, protocols).file
    if file.protocol in ("http", "https"):
        return True
    if file.is_path:
        return Path(file.url).exists()
    fs, path = open_image_file_system(file)
    return bool(fs.exists(path))
