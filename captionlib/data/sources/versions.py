"""Computes the version of an image, a short string that changes when the image changes, from file metadata alone."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.sources.locations import Location
from captionlib.storage.file_systems import split_protocol

__all__ = ["find_modified_times", "version_from_file", "version_from_listing", "version_from_stat", "version_from_uri"]

# Matches the versions that `version_from_stat` returns, but not the ETags of S3, which can also have the form
# HEX-NUMBER. In ETags, the number is small. In versions, it is a time in nanoseconds since 1970, with at least 15
# hexadecimal digits.
_STAT_VERSION = "^[0-9a-f]+-(?P<nanoseconds>(?:1[0-9a-f]|[1-9a-f])[0-9a-f]{14})$"

# Keys in the listings of remote file systems: a hash or version number of the content, and the modification time.
_CONTENT_KEYS = ("generation", "md5Hash", "content_md5", "md5", "ETag", "etag", "checksum")
_TIME_KEYS = ("mtime", "LastModified", "last_modified", "modified", "modificationTime", "updated", "created")


def version_from_stat(stat: os.stat_result) -> str:
    """Returns the version of a local file: its size and modification time in nanoseconds, in hexadecimal."""
    return f"{stat.st_size:x}-{stat.st_mtime_ns:x}"


def find_modified_times(versions: pa.StringArray) -> pa.TimestampArray:
    """Returns the modification times in UTC of local files, or null for versions of other files."""
    times = pc.extract_regex(versions, _STAT_VERSION).field("nanoseconds")
    seconds = [int(time, 16) // 10**9 if time else None for time in times.to_pylist()]
    return pa.array(seconds, pa.int64()).cast(pa.timestamp("s"))


def version_from_listing(details: Mapping[str, Any]) -> str:
    """Returns the version of a remote file from its entry in a listing of an fsspec file system.

    The version is the hash or version number in the entry, or else a hash of the size and modification time.
    """
    for key in _CONTENT_KEYS:
        if details.get(key):
            return str(details[key]).strip('"')[:64]
    times = [str(details[key]) for key in _TIME_KEYS if details.get(key)]
    return _hash("|".join([str(details.get("size")), *times[:1]]))


def version_from_file(location: Location) -> str:
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
