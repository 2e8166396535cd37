"""Reads Karpathy's `dataset.json`, which contains the captions and splits of Flickr8k, Flickr30k or COCO."""

from collections.abc import Iterator, Sequence
from typing import Any

from captionlib.data.sources.locations import Location, find_files, find_image_root, load_json, resolve_uri
from captionlib.data.sources.rows import ImageRecord, SkipCounter, SourceOptions
from captionlib.data.sources.values import (
    parse_captions,
    parse_id,
    parse_list,
    parse_object,
    parse_optional,
    parse_text,
)
from captionlib.errors import EntryError

__all__ = ["read_karpathy", "read_rows_with_imgid"]


def read_karpathy(addresses: Sequence[str], options: SourceOptions, skips: SkipCounter) -> Iterator[ImageRecord]:
    """Yields the images of `dataset.json` files in file order. One file at a time is held in memory.

    The id is `cocoid` or, if missing, `imgid`. The splits are train, restval, val and test.
    """
    for location in find_files(addresses, frozenset({".json"})):
        for _, row in read_rows_with_imgid(location, options, skips):
            yield row


def read_rows_with_imgid(
    location: Location, options: SourceOptions, skips: SkipCounter
) -> Iterator[tuple[object, ImageRecord]]:
    """Yields the images of one `dataset.json`, each with its `imgid`, the image's column in NeuralTalk's features."""
    document = parse_object(load_json(location), location.address)
    root = find_image_root(options.image_root, location)
    for index, entry in enumerate(parse_list(document.get("images"), location.address, "images")):
        origin = f"{location.address}, images[{index}]"
        try:
            image = parse_object(entry, origin)
            row = _to_row(image, root, options.default_split, origin)
        except EntryError as error:
            skips.reject_image(error.reason, error.problem)
            continue
        row.captions = _parse_sentences(image.get("sentences", []), origin, skips)
        yield image.get("imgid"), row


def _to_row(image: dict[str, Any], root: str, default_split: str, origin: str) -> ImageRecord:
    folder = parse_optional(parse_text, image.get("filepath"), origin, "filepath")
    name = parse_text(image.get("filename"), origin, "filename")
    id_field = "cocoid" if "cocoid" in image else "imgid"
    return ImageRecord(
        image_id=parse_id(image.get(id_field), origin, id_field),
        uri=resolve_uri(f"{folder}/{name}" if folder else name, root),
        split=parse_optional(parse_id, image.get("split"), origin, "split", default_split),
        captions=(),
        origin=origin,
    )


def _parse_sentences(value: object, origin: str, skips: SkipCounter) -> tuple[str, ...]:
    captions: tuple[str, ...] = ()
    try:
        for sentence in parse_list(value, origin, "sentences"):
            try:
                captions += parse_captions(sentence, origin, "sentences")
            except EntryError as error:
                skips.reject_captions(error.reason, error.problem)
    except EntryError as error:
        skips.reject_captions(error.reason, error.problem)
    return captions
