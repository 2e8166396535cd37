"""Reads COCO's captions JSON, the field's own format, through pycocotools."""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from captionlib.data.sources.locations import Location, find_files, load_json, locate, resolve_uri
from captionlib.data.sources.rows import ManifestRow, ReportSkip, SourceOptions, clean_captions
from captionlib.errors import DatasetError

__all__ = ["read_coco"]

_SPLIT = re.compile(r"(?<![a-z])(train|restval|minival|val|test|dev|unlabeled)(?:-dev)?(?:\d{4})?(?![a-z])")


def read_coco(addresses: Sequence[str], options: SourceOptions, report_skip: ReportSkip) -> Iterator[ManifestRow]:
    """The images of COCO files in the order of each file; one file at a time is held in memory.

    The id is COCO's image id. The split is the one that is asked for, or else the word in the file's name: train of
    captions_train2014.json. The images are in `train2014/` of the images' folder, where it has one, or in that folder
    itself; without one that was given, it is looked for beside the file and a level up.

    Raises:
        DatasetError: a file is not COCO's, or has annotations without captions.
    """
    for location in find_files(addresses, frozenset({".json"})):
        coco = _load(location)
        named = _SPLIT.search(location.name.lower())
        split = options.default_split or (named[1] if named else "")
        root = _find_images(options.image_root, location, named[0] if named else "")
        seen = set()
        for number, image in enumerate(coco.dataset["images"]):
            origin = f"{location.address}, images[{number}]"
            if not isinstance(image, dict) or "id" not in image or "file_name" not in image:
                raise DatasetError(f"{origin}: expected an object with id and file_name, got {image!r:.80}")
            seen.add(image["id"])
            sentences = [annotation.get("caption") for annotation in coco.imgToAnns.get(image["id"], ())]
            uri = resolve_uri(image["file_name"], root)
            yield ManifestRow(str(image["id"]), uri, split, clean_captions(sentences, origin), origin)
        for image_id in coco.imgToAnns:
            if image_id not in seen:
                report_skip("captions of an image that the file does not list")


def _load(location: Location) -> Any:
    from pycocotools.coco import COCO

    document = load_json(location)
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise DatasetError(f"{location.address} is not COCO's JSON: expected an object with images and annotations")
    annotations = document.setdefault("annotations", [])
    if annotations and not any("caption" in annotation for annotation in annotations):
        raise DatasetError(
            f"{location.address}: its annotations have no captions, but {', '.join(annotations[0])}; "
            "give COCO's captions_*.json, not its instances or keypoints"
        )
    coco = COCO()
    coco.dataset = document
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how far it is
            coco.createIndex()
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{location.address} is not COCO's JSON: an image or annotation lacks {error}") from error
    return coco


def _find_images(images: str | None, source: Location, subfolder: str) -> str:
    roots = [locate(images)] if images is not None else [source.parent, source.parent.parent]
    for root in roots:
        if subfolder and root.fs.isdir(root.join(subfolder).path):
            return root.join(subfolder).address
    return roots[0].address
