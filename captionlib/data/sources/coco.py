"""Reads COCO caption files, such as `captions_train2014.json`, with the help of pycocotools."""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from captionlib.data.sources.locations import Location, find_files, load_json, locate, resolve_uri
from captionlib.data.sources.rows import ImageRecord, SkipCounter, SourceOptions
from captionlib.data.sources.values import parse_captions, parse_id, parse_list, parse_object, parse_text
from captionlib.errors import DatasetError, EntryError

__all__ = ["read_coco"]

_SPLIT = re.compile(r"(?<![a-z])(train|restval|minival|val|test|dev|unlabeled)(?:-dev)?(?:\d{4})?(?![a-z])")


def read_coco(addresses: Sequence[str], options: SourceOptions, skips: SkipCounter) -> Iterator[ImageRecord]:
    """Yields the images of COCO caption files in file order. One file at a time is held in memory.

    The name of a file such as `captions_train2014.json` contains the default split, `train`, and the subfolder of the
    images, `train2014`. This subfolder is in `options.image_root` or, if that is None, in the folder of the file or in
    its parent folder. If there is no such subfolder, image paths are relative to the first of these folders.

    Raises:
        DatasetError: a file is not in COCO's format, or all of its captions belong to images that it does not list.
    """
    for location in find_files(addresses, frozenset({".json"})):
        document = parse_object(load_json(location), location.address)
        images = parse_list(document.get("images"), location.address, "images")
        annotations = _index_annotations(document, location, skips)
        match = _SPLIT.search(location.name.lower())
        split = options.default_split or (match[1] if match else "")
        root = _find_image_folder(options.image_root, location, match[0] if match else "")
        listed = set()
        for index, entry in enumerate(images):
            origin = f"{location.address}, images[{index}]"
            try:
                image = parse_object(entry, origin)
                image_id = parse_id(image.get("id"), origin, "id")
                uri = resolve_uri(parse_text(image.get("file_name"), origin, "file_name"), root)
            except EntryError as error:
                skips.reject_image(error.reason, error.problem)
                continue
            listed.add(image_id)
            captions = [text for annotation in annotations.get(image_id, ()) for text in annotation["captions"]]
            yield ImageRecord(image_id, uri, split, tuple(captions), origin)
        _reject_unmatched(annotations, listed, location, skips)


def _index_annotations(
    document: dict[str, Any], location: Location, skips: SkipCounter
) -> dict[str, list[dict[str, Any]]]:
    """Returns the annotations by image id. Ids are converted to text, because some files mix numbers and strings."""
    from pycocotools.coco import COCO

    entries = parse_list(document.get("annotations", []), location.address, "annotations")
    objects = [entry for entry in entries if isinstance(entry, dict)]
    if objects and not any("caption" in annotation for annotation in objects):
        raise DatasetError(
            f"{location.address}: expected annotations with the key caption, got {', '.join(objects[0])}; "
            "use COCO's captions_*.json instead of its instances or keypoints files"
        )
    parsed = []
    for index, entry in enumerate(entries):
        origin = f"{location.address}, annotations[{index}]"
        try:
            annotation = parse_object(entry, origin)
            captions = parse_captions(annotation.get("caption"), origin, "caption")
            image_id = parse_id(annotation.get("image_id"), origin, "image_id")
        except EntryError as error:
            skips.reject_captions(error.reason, error.problem)
            continue
        parsed.append({"id": index, "image_id": image_id, "captions": captions})
        if not captions:
            skips.reject_captions("annotation without a caption", origin)
    coco = COCO()
    coco.dataset = {"annotations": parsed}
    with contextlib.redirect_stdout(io.StringIO()):  # createIndex prints its progress
        coco.createIndex()
    by_image: dict[str, list[dict[str, Any]]] = coco.imgToAnns
    return by_image


def _reject_unmatched(
    annotations: dict[str, list[dict[str, Any]]], listed: set[str], location: Location, skips: SkipCounter
) -> None:
    """Rejects the captions of images that the file does not list.

    Raises:
        DatasetError: the file has captions, but lists none of their images.
    """
    unmatched = [image_id for image_id in annotations if image_id not in listed]
    if listed and unmatched and len(unmatched) == len(annotations):
        raise DatasetError(
            f"{location.address}: expected annotations with an image_id from `images`, such as "
            f"{min(listed)!r}, got none (the first is {unmatched[0]!r}); check that images and "
            "annotations come from the same dataset"
        )
    for image_id in unmatched:
        skips.reject_captions("captions of an unlisted image", f"{location.address}, image_id {image_id}")


def _find_image_folder(image_root: str | None, source: Location, subfolder: str) -> str:
    roots = [locate(image_root)] if image_root is not None else [source.parent, source.parent.parent]
    for root in roots:
        if subfolder and root.join(subfolder).find_type() == "directory":
            return root.join(subfolder).address
    return roots[0].address
