"""Reads Flickr8k and Flickr30k: caption files with lines of `NAME.jpg#K<TAB>caption`, and their split files."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from captionlib.data.images.formats import IMAGE_EXTENSIONS
from captionlib.data.sources.locations import (
    Location,
    find_files,
    find_image_root,
    get_extension,
    list_folder,
    locate,
    read_lines,
    resolve_uri,
)
from captionlib.data.sources.rows import ImageRecord, SkipCounter, SourceOptions
from captionlib.data.sources.values import parse_captions, parse_cell
from captionlib.errors import DatasetError, EntryError

__all__ = ["CAPTION_LINE", "read_flickr"]

# Flickr8k has captions for `2258277193_586949ec62.jpg.1`, but the name of the image file ends with `.jpg`.
CAPTION_LINE = re.compile(r"(?P<name>[^\t#]+?\.\w+?)(?:\.\d+)?#\w+\t(?P<caption>.*)", re.DOTALL)
_OFFICIAL_SPLIT_FILE = re.compile(r"(?i)flickr_?(?:8|30)k\.(?P<split>train|dev|val|test)images\.txt")


def read_flickr(addresses: Sequence[str], options: SourceOptions, skips: SkipCounter) -> Iterator[ImageRecord]:
    """Yields the images of caption files in file order. The id is the image's file name.

    Splits come from `options.split_files` or, by default, from the official split files in the folder of the captions,
    such as `Flickr_8k.trainImages.txt`. If split files are used, images that none of them lists are skipped.
    """
    for location in find_files(addresses, frozenset({".txt", ".token"})):
        split_files = {split: locate(file) for split, file in options.split_files.items()}
        split_files = split_files or _find_official_split_files(location.parent)
        splits = _read_splits(split_files)
        root = find_image_root(options.image_root, location)
        captioned = set()
        for name, captions, origin in _read_images(location, skips):
            key = _strip_image_extension(name)
            if split_files and key not in splits:
                skips.count_ignored("not in any split file")
                continue
            captioned.add(key)
            yield ImageRecord(name, resolve_uri(name, root), splits.get(key, options.default_split), captions, origin)
        for _ in splits.keys() - captioned:
            skips.count_ignored("in a split file, but without captions")


def _read_images(location: Location, skips: SkipCounter) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yields the name, the captions and the origin (file and first line) of each image."""
    for name, group in groupby(_parse_lines(location, skips), key=lambda line: line[0]):
        lines = list(group)
        origin = f"{location.address}, line {lines[0][2]}"
        captions: tuple[str, ...] = ()
        for _, caption, number in lines:
            try:
                # As in a table, the text may be a list of captions.
                captions += parse_captions(parse_cell(caption), f"{location.address}, line {number}", "caption")
            except EntryError as error:
                skips.reject_captions(error.reason, error.problem)
        yield name, captions, origin


def _parse_lines(location: Location, skips: SkipCounter) -> Iterator[tuple[str, str, int]]:
    """Yields the image name, the caption and the line number of each line."""
    for number, line in enumerate(read_lines(location), 1):
        if not line.strip():
            continue
        match = CAPTION_LINE.fullmatch(line)
        if match is None:
            skips.reject_captions(
                "line in a different format",
                f"{location.address}, line {number}: expected NAME.jpg#NUMBER, a tab and a caption, got {line!r:.80}",
            )
            continue
        yield match["name"], match["caption"], number


def _find_official_split_files(folder: Location) -> dict[str, Location]:
    matches = [_OFFICIAL_SPLIT_FILE.fullmatch(name) for name in sorted(name for name, _, _ in list_folder(folder))]
    return {match["split"].lower(): folder.join(match[0]) for match in matches if match}


def _read_splits(files: Mapping[str, Location]) -> dict[str, str]:
    """Maps image names without extension to splits. Only some split files include the extension."""
    splits: dict[str, str] = {}
    for split, location in files.items():
        for line in read_lines(location):
            name = _strip_image_extension(line.strip())
            if name and splits.setdefault(name, split) != split:
                raise DatasetError(
                    f"{location.address}: expected each image in one split, got {name} in {splits[name]} and in {split}"
                )
    return splits


def _strip_image_extension(name: str) -> str:
    extension = get_extension(name)
    return name[: -len(extension)] if extension in IMAGE_EXTENSIONS else name
