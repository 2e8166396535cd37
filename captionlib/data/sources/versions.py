"""Computes versions of images: short strings that change when the image does. Images are listed but not read."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from captionlib.data.sources.locations import Location
from captionlib.storage.file_systems import split_protocol

__all__ = ["version_from_file", "version_from_listing", "version_from_status", "version_from_uri"]

# Keys under which file systems list a hash or a generation of an object, and its modification time.
_HASH_KEYS = ("generation", "md5Hash", "content_md5", "md5", "ETag", "etag", "checksum")
_TIME_KEYS = ("mtime", "LastModified", "last_modified", "modified", "modificationTime", "updated", "created")


def version_from_status(status: os.stat_result) -> str:
    """Returns the version of a local file: its size and modification time in nanoseconds, in hexadecimal."""
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"


def version_from_listing(details: Mapping[str, Any]) -> str:
    """Returns the version of a remote file from its entry in a listing of an fsspec file system.

    The version is a hash or a generation of the content or, if the listing contains none, a hash of size and time.
    """
    for key in _HASH_KEYS:
        if details.get(key):
            return str(details[key]).strip('"')[:64]
    times = [str(details[key]) for key in _TIME_KEYS if details.get(key)]
    return _hash("|".join([str(details.get("size")), *times[:1]]))


def version_from_file(location: Location) -> str:
    """Returns the version of a file of the source, such as a tar, from its status or its entry in a listing."""
    if location.is_local:
        return version_from_status(os.stat(location.path))  # noqa: PTH116
    return version_from_listing(location.fs.info(location.path))


def version_from_uri(uri: str) -> str:
    """Returns the version of the image at a uri: the version of a local file, and otherwise a hash of the uri."""
    if not split_protocol(uri)[0]:
        try:
            return version_from_status(os.stat(uri))  # noqa: PTH116  # faster than Path
        except (OSError, ValueError):
            pass  # the image is missing, or only the workers can read it
    return _hash(uri)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
