"""Lists the supported formats of sources (input datasets), detects the format of a source and reads it."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from captionlib.data.images.formats import IMAGE_EXTENSIONS
from captionlib.data.sources.coco import read_coco
from captionlib.data.sources.flickr import CAPTION_LINE, read_flickr
from captionlib.data.sources.folder import read_folder
from captionlib.data.sources.hf_parquet import find_image_columns, read_hf_parquet
from captionlib.data.sources.karpathy import read_karpathy
from captionlib.data.sources.locations import (
    Location,
    find_files,
    get_extension,
    get_uncompressed_extension,
    is_glob,
    locate_all,
    open_file,
    read_lines,
    scan_folder,
)
from captionlib.data.sources.rows import ImageRecord, SkipCounter, SourceOptions, SourceReader
from captionlib.data.sources.tables import TABLE_EXTENSIONS, open_parquet, read_tables
from captionlib.data.sources.values import is_unicode, parse_json
from captionlib.data.sources.versions import version_from_uri
from captionlib.data.sources.webdataset import read_webdataset
from captionlib.errors import ConfigError, DatasetError
from captionlib.storage.retries import convert_os_errors

__all__ = ["SOURCE_FORMATS", "SourceFormat", "detect_common_format", "detect_format", "read_source"]


@dataclass(frozen=True)
class SourceFormat:
    """A supported format of input datasets."""

    read: SourceReader
    row_description: str  # the parts of the source that rows are read from, for an error message
    stores_image_paths: bool  # instead of images


SOURCE_FORMATS: Mapping[str, SourceFormat] = {
    "folder": SourceFormat(
        read_folder, "visible files with an image extension or no extension", stores_image_paths=False
    ),
    "coco": SourceFormat(read_coco, "entries of `images`", stores_image_paths=True),
    "karpathy": SourceFormat(read_karpathy, "entries of `images`", stores_image_paths=True),
    "flickr": SourceFormat(read_flickr, "lines `NAME.jpg#K<tab>caption` of images in a split", stores_image_paths=True),
    "table": SourceFormat(read_tables, "rows below the header", stores_image_paths=True),
    "webdataset": SourceFormat(read_webdataset, "NAME.jpg, NAME.png etc. in the tars", stores_image_paths=False),
    "hf-parquet": SourceFormat(read_hf_parquet, "rows with a column of images", stores_image_paths=False),
}

_PEEK_BYTES = 1 << 20
_TAR_EXTENSIONS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def read_source(
    source_format: str, addresses: Sequence[str], options: SourceOptions, skips: SkipCounter
) -> Iterator[ImageRecord]:
    """Yields the rows of a source. Skips rows and captions that are not valid Unicode.

    Raises:
        ConfigError: an option does not apply to the source.
        DatasetError: the source cannot be read, or all of its images or captions are skipped.
    """
    images = captions = 0
    for row in SOURCE_FORMATS[source_format].read(addresses, options, skips):
        if not options.captions:
            row.captions = ()
        if not is_unicode("".join((row.image_id, row.uri, row.split, *row.captions))):
            if not all(map(is_unicode, (row.image_id, row.uri, row.split))):
                skips.reject_image("name is not UTF-8", row.origin)
                continue
            valid = tuple(filter(is_unicode, row.captions))
            for _ in range(len(row.captions) - len(valid)):
                skips.reject_captions("caption is not UTF-8", row.origin)
            row.captions = valid
        row.version = row.version or version_from_uri(row.uri)  # for a local file, it changes with the content
        images += 1
        captions += len(row.captions)
        yield row
    if skips.examples and not images:
        raise DatasetError(
            f"{', '.join(addresses[:3])}: expected images, got no valid ones; skipped: {skips.describe()}; "
            "correct the source"
        )
    if options.captions and skips.caption_reasons and not captions:
        raise DatasetError(
            f"{', '.join(addresses[:3])}: expected captions, got no valid ones; skipped: {skips.describe()}; "
            "correct the source, or use --no-captions to prepare only the images"
        )


def detect_common_format(addresses: Sequence[str]) -> str:
    """Returns the common format of all sources: a key of `SOURCE_FORMATS`."""
    if not addresses:
        raise ConfigError("expected at least one source (path, URL or glob), got none")
    first_addresses: dict[str, str] = {}  # by format
    for address in addresses:
        first_addresses.setdefault(detect_format(address), address)
    if len(first_addresses) > 1:
        formats = ", ".join(f"{address} is {source_format}" for source_format, address in first_addresses.items())
        raise ConfigError(
            f"expected sources of one format, got several: {formats}; prepare each separately, or set --format"
        )
    return next(iter(first_addresses))


def detect_format(address: str | os.PathLike[str]) -> str:
    """Returns the format of a source: a key of `SOURCE_FORMATS`."""
    location = locate_all(address)[0]
    if is_glob(location):
        return _detect_glob(location)
    return _detect_folder(location) if location.find_type() == "directory" else _detect_file(location.require())


def _detect_glob(location: Location) -> str:
    extension = get_uncompressed_extension(location.name)
    if extension in TABLE_EXTENSIONS or extension == ".json" or _is_tar(location.name):
        return _detect_file(next(find_files([location.address], frozenset())))
    return "folder"


def _detect_folder(folder: Location) -> str:
    parquet: Location | None = None
    has_tars = False
    with convert_os_errors(folder.address):
        for name, kind, _ in scan_folder(folder):
            if name.startswith((".", "_")):
                continue
            if kind == "directory" or get_extension(name) in IMAGE_EXTENSIONS:
                return "folder"
            has_tars = has_tars or _is_tar(name)
            if get_extension(name) == ".parquet":
                parquet = folder.join(name)
    if has_tars:
        return "webdataset"
    return "folder" if parquet is None else _detect_parquet(parquet)


def _detect_file(location: Location) -> str:
    extension = get_uncompressed_extension(location.name)
    if _is_tar(location.name):
        return "webdataset"
    if extension == ".parquet":
        return _detect_parquet(location)
    if extension in TABLE_EXTENSIONS:
        return "table"
    if extension == ".json":
        return _detect_json(location)
    if extension in {".txt", ".token"}:
        return "flickr" if CAPTION_LINE.fullmatch(next(read_lines(location), "")) else "table"
    if extension in IMAGE_EXTENSIONS:
        return "folder"
    raise ConfigError(
        f"{location.address}: its format cannot be detected; set --format to one of {', '.join(SOURCE_FORMATS)}"
    )


def _is_tar(name: str) -> bool:
    return name.lower().endswith(_TAR_EXTENSIONS)


def _detect_parquet(location: Location) -> str:
    with open_file(location) as file:
        return "hf-parquet" if find_image_columns(open_parquet(file, location).schema_arrow) else "table"


def _detect_json(location: Location) -> str:
    """Detects a JSON format by the keys in the first megabyte. Parsing the whole file here would be slow."""
    with open_file(location, decompress=True) as file:
        start = file.read(_PEEK_BYTES).decode("utf-8-sig", errors="replace")
    if start.lstrip().startswith("["):
        return "table"
    with contextlib.suppress(DatasetError):
        first = parse_json(start.lstrip().partition("\n")[0], location.address)
        if isinstance(first, dict) and "images" not in first:
            return "table"
    if re.search(r'"(?:sentences|sentids)"\s*:', start):
        return "karpathy"
    if re.search(r'"(?:annotations|file_name|coco_url)"\s*:', start):
        return "coco"
    raise ConfigError(
        f"{location.address}: expected COCO's captions, Karpathy's dataset.json, a list of records or one JSON object "
        "per line, got other JSON; set --format to coco, karpathy or table if it is one of these"
    )
