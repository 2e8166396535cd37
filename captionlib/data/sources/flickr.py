"""Reads the captions of Flickr8k and Flickr30k, lines of `NAME.jpg#K<TAB>caption`, and their splits, files of names."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from captionlib.data.sources.locations import (
    IMAGE_EXTENSIONS,
    Location,
    find_files,
    find_image_root,
    get_extension,
    locate,
    read_lines,
    resolve_uri,
    scan_folder,
)
from captionlib.data.sources.rows import ManifestRow, ReportSkip, SourceOptions, clean_captions
from captionlib.errors import ConfigError, DatasetError

__all__ = ["LINE", "read_flickr"]

# Flickr8k has captions of `2258277193_586949ec62.jpg.1`; the image is the one without the number.
LINE = re.compile(r"(?P<name>[^\t#]+?\.\w+?)(?:\.\d+)?#\w+\t(?P<caption>.*)", re.DOTALL)
_OFFICIAL = re.compile(r"(?i)flickr_?(?:8|30)k\.(?P<split>train|dev|val|test)images\.txt")


def read_flickr(addresses: Sequence[str], options: SourceOptions, report_skip: ReportSkip) -> Iterator[ManifestRow]:
    """The images of caption files, in their order; the id is the image's file name.

    Splits come from the files that are given, or from the official ones beside the captions
    (`Flickr_8k.trainImages.txt` ...). With them, an image that is in none is skipped, as the official sets do; without
    any, all images are kept.

    Raises:
        ConfigError: two split files name the same image.
        DatasetError: a line is of another form.
    """
    for location in find_files(addresses, frozenset({".txt", ".token"})):
        files = {split: locate(file) for split, file in options.split_files.items()} or _find_official(location)
        splits = _read_splits(files)
        root = find_image_root(options.image_root, location)
        met = set()
        for name, captions, origin in _read_images(location):
            key = _without_extension(name)
            if files and key not in splits:
                report_skip("in none of the split files")
                continue
            met.add(key)
            yield ManifestRow(name, resolve_uri(name, root), splits.get(key, options.default_split), captions, origin)
        for _ in splits.keys() - met:
            report_skip("in a split file, but without captions")


def _read_images(location: Location) -> Iterator[tuple[str, tuple[str, ...], str]]:
    for name, lines in groupby(_parse(location), key=lambda line: line[0]):
        number, captions = 0, []
        for _, caption, line in lines:
            number = number or line
            captions.append(caption)
        origin = f"{location.address}, line {number}"
        yield name, clean_captions(captions, origin), origin


def _parse(location: Location) -> Iterator[tuple[str, str, int]]:
    for number, line in enumerate(read_lines(location), 1):
        if not line.strip():
            continue
        found = LINE.fullmatch(line)
        if found is None:
            raise DatasetError(
                f"{location.address}, line {number}: expected NAME.jpg#NUMBER, a tab and a caption, got {line!r:.80}"
            )
        yield found["name"], found["caption"], number


def _find_official(captions: Location) -> dict[str, Location]:
    folder = captions.parent
    found = ((_OFFICIAL.fullmatch(name), name) for name in sorted(name for name, _ in scan_folder(folder)))
    return {match["split"].lower(): folder.join(name) for match, name in found if match}


def _read_splits(files: Mapping[str, Location]) -> dict[str, str]:
    """Image name without extension to split: some split files have the extensions, some do not."""
    splits: dict[str, str] = {}
    for split, location in files.items():
        for line in read_lines(location):
            name = _without_extension(line.strip())
            if name and splits.setdefault(name, split) != split:
                raise ConfigError(f"{location.address}: {name} is in split {split} and in {splits[name]}")
    return splits


def _without_extension(name: str) -> str:
    extension = get_extension(name)
    return name[: -len(extension)] if extension in IMAGE_EXTENSIONS else name
