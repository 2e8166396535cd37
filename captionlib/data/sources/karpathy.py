"""Reads `dataset.json`, Karpathy's splits of Flickr8k, Flickr30k and COCO."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from captionlib.data.sources.locations import Location, find_files, find_image_root, load_json, resolve_uri
from captionlib.data.sources.rows import ManifestRow, ReportSkip, SourceOptions, parse_captions
from captionlib.errors import DatasetError

__all__ = ["read_karpathy", "read_numbered_rows"]


def read_karpathy(addresses: Sequence[str], options: SourceOptions, report_skip: ReportSkip) -> Iterator[ManifestRow]:
    """Yields the images of `dataset.json` files in file order. Memory holds one file at a time.

    The id is `cocoid`, or `imgid` for images without one. The splits are Karpathy's: train, restval, val and test.

    Raises:
        DatasetError: a file is not Karpathy's.
    """
    for location in find_files(addresses, frozenset({".json"})):
        for _, row in read_numbered_rows(location, options):
            yield row


def read_numbered_rows(location: Location, options: SourceOptions) -> Iterator[tuple[object, ManifestRow]]:
    """Yields the images of one `dataset.json`, each with its `imgid`: its column number in `vgg_feats.mat`.

    Raises:
        DatasetError: the file is not Karpathy's.
    """
    document = load_json(location)
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise DatasetError(f"{location.address} is not Karpathy's dataset.json: expected an object with images")
    root = find_image_root(options.image_root, location)
    for number, image in enumerate(document["images"]):
        row = _to_row(image, root, options.default_split, f"{location.address}, images[{number}]")
        yield image.get("imgid"), row


def _to_row(image: Mapping[str, Any], root: str, default_split: str, origin: str) -> ManifestRow:
    if not isinstance(image, Mapping) or "filename" not in image or not {"cocoid", "imgid"} & image.keys():
        raise DatasetError(f"{origin}: expected an object with filename, imgid and sentences, got {image!r:.80}")
    path = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
    captions = [_to_caption(sentence, origin) for sentence in image.get("sentences", ())]
    return ManifestRow(
        image_id=str(image["cocoid"] if "cocoid" in image else image["imgid"]),
        uri=resolve_uri(path, root),
        split=image.get("split") or default_split,
        captions=parse_captions(captions, origin),
        origin=origin,
    )


def _to_caption(sentence: Mapping[str, Any], origin: str) -> str:
    if "raw" in sentence:
        return str(sentence["raw"])
    if "tokens" in sentence:
        return " ".join(sentence["tokens"])
    raise DatasetError(f"{origin}: expected sentences with raw or tokens, got {sentence!r:.80}")
