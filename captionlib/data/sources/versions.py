"""Computes versions of images: short strings that change when the image does, from file metadata alone."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from captionlib.data.sources.locations import Location
from captionlib.storage.file_systems import split_protocol

__all__ = ["version_from_file", "version_from_listing", "version_from_stat", "version_from_uri"]

# Keys in the listings of remote file systems: a hash or version number of the content, and the modification time.
_CONTENT_KEYS = ("generation", "md5Hash", "content_md5", "md5", "ETag", "etag", "checksum")
_TIME_KEYS = ("mtime", "LastModified", "last_modified", "modified", "modificationTime", "updated", "created")


def version_from_stat(stat: os.stat_result) -> str:
    """Returns the version of a local file: its size and modification time in nanoseconds, in hexadecimal."""
    return f"{stat.st_size:x}-{stat.st_mtime_ns:x}"


def version_from_listing(details: Mapping[str, Any]) -> str:
    """Returns the version of a remote file from its entry in a listing of an fsspec file system.

    The version is the entry's own hash or version number or, if it has neither, a hash of size and modification time.
    """
    for key in _CONTENT_KEYS:
        if details.get(key):
            return str(details[key]).strip('"')[:64]
    times = [str(details[key]) for key in _TIME_KEYS if details.get(key)]
    return _hash("|".join([str(details.get("size")), *times[:1]]))


def version_from_file(location: Location) -> str:
    """Returns the version of a local or remote source file, such as a tar."""
    if location.is_local:
        return version_from_stat(os.stat(location.path))  # noqa: PTH116
    return version_from_listing(location.fs.info(location.path))


def version_from_uri(uri: str) -> str:
    """Returns the version of a local image, or a hash of the uri if the image is remote or not found."""
    if not split_protocol(uri)[0]:
        try:
            return version_from_stat(os.stat(uri))  # noqa: PTH116  # faster than Path
        except (OSError, ValueError):
            pass  # the image is missing, or only the workers can read it
    return _hash(uri)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
