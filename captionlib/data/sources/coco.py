"""Reads the captions JSON of COCO through pycocotools."""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from captionlib.data.sources.locations import Location, find_files, load_json, locate, resolve_uri
from captionlib.data.sources.rows import ManifestRow, ReportSkip, SourceOptions, parse_captions
from captionlib.errors import DatasetError

__all__ = ["read_coco"]

_SPLIT = re.compile(r"(?<![a-z])(train|restval|minival|val|test|dev|unlabeled)(?:-dev)?(?:\d{4})?(?![a-z])")


def read_coco(addresses: Sequence[str], options: SourceOptions, report_skip: ReportSkip) -> Iterator[ManifestRow]:
    """Yields the images of COCO files in file order. Memory holds one file at a time.

    The id is COCO's image id. The split is `options.default_split`, or else the one in the file name: `train` for
    `captions_train2014.json`. The images are in the subfolder of the image root that the file name mentions, here
    `train2014/`, or else in the root itself. The default root is the file's folder, or its parent if only that has the
    subfolder.

    Raises:
        DatasetError: a file is not COCO's, or its annotations have no captions.
    """
    for location in find_files(addresses, frozenset({".json"})):
        coco = _load(location)
        match = _SPLIT.search(location.name.lower())
        split = options.default_split or (match[1] if match else "")
        root = _find_image_folder(options.image_root, location, match[0] if match else "")
        listed = set()
        for number, image in enumerate(coco.dataset["images"]):
            origin = f"{location.address}, images[{number}]"
            if not isinstance(image, dict) or "id" not in image or "file_name" not in image:
                raise DatasetError(f"{origin}: expected an object with id and file_name, got {image!r:.80}")
            listed.add(image["id"])
            captions = [annotation.get("caption") for annotation in coco.imgToAnns.get(image["id"], ())]
            uri = resolve_uri(image["file_name"], root)
            yield ManifestRow(str(image["id"]), uri, split, parse_captions(captions, origin), origin)
        for image_id in coco.imgToAnns:
            if image_id not in listed:
                report_skip("captions of an unlisted image")


def _load(location: Location) -> Any:
    from pycocotools.coco import COCO

    document = load_json(location)
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise DatasetError(f"{location.address} is not COCO's JSON: expected an object with images and annotations")
    annotations = document.setdefault("annotations", [])
    if annotations and not any("caption" in annotation for annotation in annotations):
        raise DatasetError(
            f"{location.address}: expected annotations with a caption, got ones with {', '.join(annotations[0])}; "
            "use COCO's captions_*.json instead of its instances or keypoints"
        )
    coco = COCO()
    coco.dataset = document
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # createIndex prints its progress
            coco.createIndex()
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{location.address} is not COCO's JSON: an image or annotation lacks {error}") from error
    return coco


def _find_image_folder(image_root: str | None, source: Location, subfolder: str) -> str:
    roots = [locate(image_root)] if image_root is not None else [source.parent, source.parent.parent]
    for root in roots:
        if subfolder and root.fs.isdir(root.join(subfolder).path):
            return root.join(subfolder).address
    return roots[0].address
