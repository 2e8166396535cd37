"""Exports captions or references to a JSON file in the format of COCO or NeuralTalk."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from captionlib.data.selection import ALL_IMAGES, ImageSelection
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import to_json
from captionlib.errors import DatasetError
from captionlib.evaluation.predictions import (
    find_repeated,
    is_dataset,
    load_predictions,
    open_references,
    to_coco_ids,
    to_coco_results,
    to_result_struct,
)
from captionlib.storage.folders import Addresses, list_addresses, write_file

__all__ = ["JsonFormat", "export_json", "to_coco_captions"]

JsonFormat = Literal["coco", "neuraltalk"]


def export_json(
    sources: Addresses,
    output: str | os.PathLike[str],
    json_format: JsonFormat,
    *,
    selection: ImageSelection = ALL_IMAGES,
    manifest: str | os.PathLike[str] | None = None,
) -> int:
    """Writes captions as one JSON file and returns the number of images in it.

    The sources are captions datasets, or JSON files of COCO or NeuralTalk. The references and splits of `manifest`
    (a table of images) are added to them. `coco` writes COCO's results or, if all sources are manifests or features
    datasets, COCO's annotations with their references. `neuraltalk` writes `result_struct.json`.

    Raises:
        DatasetError: a source cannot be read, two sources contain the same image, or no image is selected.
    """
    addresses = [os.fspath(address) for address in list_addresses(sources)]
    opened = [open_dataset(address) for address in addresses if is_dataset(address)]
    content: Any
    if json_format == "coco" and opened and all(dataset.kind in ("manifest", "features") for dataset in opened):
        rows = [row for address in addresses for row in _read_rows(open_references(address), selection)]
        ids, content = [row["image_id"] for row in rows], to_coco_captions(rows)
    else:
        predictions = [
            prediction
            for address in addresses
            for prediction in load_predictions(address, manifest)
            if selection.selects(prediction.image_id, prediction.split)
        ]
        ids = [prediction.image_id for prediction in predictions]
        if json_format == "coco":
            content = to_coco_results(predictions)
        else:
            content = to_result_struct(predictions, {"captions": " ".join(addresses)})
    _check_ids(ids, addresses)
    write_file(output, to_json(content))
    return len(ids)


def to_coco_captions(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns images and their references in the format of COCO's `captions_val2014.json`.

    The rows are those of a manifest or of features, with image_id, uri and captions, and possibly width and height.
    """
    rows = list(rows)
    ids = to_coco_ids([row["image_id"] for row in rows])
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, row in zip(ids, rows, strict=True):
        size = {name: row[name] for name in ("width", "height") if row.get(name) is not None}
        images.append({"id": image_id, "file_name": row["uri"], **size})
        for caption in row["captions"]:
            annotations.append({"id": len(annotations), "image_id": image_id, "caption": caption})
    return {"images": images, "annotations": annotations}


def _read_rows(dataset: ShardedDataset, selection: ImageSelection) -> Iterable[dict[str, Any]]:
    columns = ["image_id", "uri", "split", "captions", "width", "height"]
    for shard in range(dataset.shards):
        for batch in dataset.read_batches(shard, columns, batch_size=8192):
            yield from (row for row in batch.to_pylist() if selection.selects(row["image_id"], row["split"]))


def _check_ids(ids: Sequence[str], addresses: Sequence[str]) -> None:
    names = " and ".join(addresses)
    if not ids:
        raise DatasetError(
            f"{names}: expected at least one selected image, got none; check --split, --where and --duplicates"
        )
    if (repeated := find_repeated(ids)) is not None:
        raise DatasetError(
            f"{names}: expected one row per image, got two for image {repeated}; export only sources that have no "
            "image in common"
        )
