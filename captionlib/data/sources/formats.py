"""Tells what kind of source a path is, by its name and its first bytes."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from captionlib.data.sources.coco import read_coco
from captionlib.data.sources.flickr import LINE, read_flickr
from captionlib.data.sources.folder import read_folder
from captionlib.data.sources.hf_parquet import image_columns, read_hf_parquet
from captionlib.data.sources.karpathy import read_karpathy
from captionlib.data.sources.locations import (
    IMAGE_EXTENSIONS,
    Location,
    expand_braces,
    find_files,
    get_extension,
    get_text_extension,
    is_pattern,
    locate,
    read_lines,
    scan_folder,
)
from captionlib.data.sources.rows import ReadRows
from captionlib.data.sources.tables import TABLE_EXTENSIONS, open_parquet, read_tables
from captionlib.data.sources.webdataset import read_webdataset
from captionlib.errors import ConfigError, DatasetError
from captionlib.storage.file_systems import open_decompressed

__all__ = ["SOURCE_FORMATS", "SourceFormat", "detect_common_format", "detect_format"]


@dataclass(frozen=True)
class SourceFormat:
    """A kind of source.

    Attributes:
        read: yields its rows.
        row_description: what a row is made of, for the message that there is none.
        references_images: it names images without having seen them, so that they may be elsewhere than it says.
    """

    read: ReadRows
    row_description: str
    references_images: bool


SOURCE_FORMATS: Mapping[str, SourceFormat] = {
    "folder": SourceFormat(read_folder, "files with an image's extension or none, not hidden", references_images=False),
    "coco": SourceFormat(read_coco, "entries of `images`", references_images=True),
    "karpathy": SourceFormat(read_karpathy, "entries of `images`", references_images=True),
    "flickr": SourceFormat(read_flickr, "lines of NAME.jpg#K, a tab and a caption, in a split", references_images=True),
    "table": SourceFormat(read_tables, "rows below the header", references_images=True),
    "webdataset": SourceFormat(read_webdataset, "NAME.jpg, NAME.png ... in the tars", references_images=False),
    "hf-parquet": SourceFormat(read_hf_parquet, "rows with a column of struct<bytes, path>", references_images=False),
}

_PEEK_BYTES = 1 << 20
_TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def detect_common_format(addresses: Sequence[str]) -> str:
    """The one family that all addresses are of.

    Raises:
        ConfigError: they are of several, or it cannot be told.
        DatasetError: an address leads nowhere.
    """
    if not addresses:
        raise ConfigError("no source: expected at least one path or address")
    found: dict[str, str] = {}
    for address in addresses:
        found.setdefault(detect_format(address), address)
    if len(found) > 1:
        kinds = ", ".join(f"{address} is {family}" for family, address in found.items())
        raise ConfigError(f"sources of several kinds: {kinds}; prepare them one by one, or say which by --format")
    return next(iter(found))


def detect_format(address: str | os.PathLike[str]) -> str:
    """The family of a source: a key of `SOURCE_FORMATS`.

    Raises:
        ConfigError: it cannot be told.
        DatasetError: the address leads nowhere.
    """
    location = locate(address)
    if not location.fs.exists(location.path):
        location = locate(expand_braces(os.fspath(address))[0])
    if is_pattern(location):
        return _detect_pattern(location)
    if location.fs.isdir(location.path):
        return _detect_folder(location)
    if not location.fs.exists(location.path):
        raise DatasetError(f"{location.address} does not exist; expected a file, a folder or a glob")
    return _detect_file(location)


def _detect_pattern(location: Location) -> str:
    suffix = get_text_extension(location.name)
    if suffix in TABLE_EXTENSIONS or suffix == ".json" or location.name.endswith(_TARS):
        return _detect_file(next(find_files([location.address], frozenset())))
    return "folder"


def _detect_folder(folder: Location) -> str:
    """A folder of nothing but tars (and what img2dataset writes beside them), or of nothing but Parquet."""
    parquet: Location | None = None
    tars = False
    for name, kind in scan_folder(folder):
        if name.startswith((".", "_")):
            continue
        if kind == "directory" or get_extension(name) in IMAGE_EXTENSIONS:
            return "folder"
        tars = tars or name.endswith(_TARS)
        if get_extension(name) == ".parquet":
            parquet = folder.join(name)
    if tars:
        return "webdataset"
    return "folder" if parquet is None else _detect_parquet(parquet)


def _detect_file(location: Location) -> str:
    suffix = get_text_extension(location.name)
    if location.name.lower().endswith(_TARS):
        return "webdataset"
    if suffix == ".parquet":
        return _detect_parquet(location)
    if suffix in TABLE_EXTENSIONS:
        return "table"
    if suffix == ".json":
        return _detect_json(location)
    if suffix in {".txt", ".token"}:
        return "flickr" if LINE.fullmatch(next(read_lines(location), "")) else "table"
    if suffix in IMAGE_EXTENSIONS:
        return "folder"
    raise ConfigError(
        f"{location.address}: cannot tell what kind of source it is; say --format {'|'.join(SOURCE_FORMATS)}"
    )


def _detect_parquet(location: Location) -> str:
    with location.fs.open(location.path, "rb") as file:
        return "hf-parquet" if image_columns(open_parquet(file, location).schema_arrow) else "table"


def _detect_json(location: Location) -> str:
    """By the keys in the first megabyte: whole files are large, and read once is enough."""
    with open_decompressed(location.fs, location.path) as file:
        start = file.read(_PEEK_BYTES).decode("utf-8-sig", errors="replace")
    first = _parse(start.lstrip().partition("\n")[0])
    if isinstance(first, dict) and "images" not in first:
        return "table"
    if re.search(r'"(?:sentences|sentids)"\s*:', start):
        return "karpathy"
    if re.search(r'"(?:annotations|file_name|coco_url)"\s*:', start):
        return "coco"
    raise ConfigError(
        f"{location.address}: cannot tell what kind of JSON it is; expected COCO's captions, Karpathy's dataset.json, "
        "or one object a line; say which by --format coco|karpathy|table"
    )


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
