"""Reads captions from a captions dataset (Parquet) or from COCO's or NeuralTalk's JSON, and converts them to JSON.

COCO's evaluation server accepts results as `[{"image_id": 391895, "caption": "a man rides a bike"}, ...]`. NeuralTalk's
`result_struct.json` contains captions, references and the parameters of the run: `{"imgblobs": [{"img_path", "imgid",
"references": [{"text"}], "candidate": {"text", "logprob"}}, ...], ...}`.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.sources.locations import get_uncompressed_extension, load_json, locate
from captionlib.data.sources.values import (
    describe_value,
    is_unicode,
    parse_id,
    parse_list,
    parse_object,
    parse_optional,
    parse_text,
)
from captionlib.data.splits import add_split_aliases
from captionlib.errors import DatasetError

__all__ = [
    "Prediction",
    "find_images_without_caption",
    "find_repeated",
    "is_dataset",
    "join_references",
    "load_predictions",
    "open_references",
    "read_predictions",
    "select_splits",
    "to_coco_ids",
    "to_coco_results",
    "to_result_struct",
]

_INTEGER_ID = re.compile("0|[1-9][0-9]{0,18}")  # without leading zeros, which integers lose
_MAX_INTEGER_ID = 2**63 - 1


@dataclass(frozen=True)
class Prediction:
    """The caption that a model generated for an image. Unknown values are empty or None."""

    image_id: str
    caption: str
    uri: str = ""
    split: str = ""
    log_prob: float | None = None
    candidates: tuple[tuple[str, float], ...] = ()  # the n best captions with their log-probabilities, best first
    references: tuple[str, ...] = ()
    image_text_score: float | None = None  # similarity of the caption and the image

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Prediction":
        """Converts a row of a captions dataset."""
        return cls(
            image_id=row["image_id"],
            caption=row["caption"],
            uri=row["uri"],
            split=row["split"],
            log_prob=row["log_prob"],
            image_text_score=row.get("image_text_score"),
            candidates=tuple((candidate["caption"], candidate["log_prob"]) for candidate in row["candidates"]),
        )


def load_predictions(
    source: str | os.PathLike[str], manifest: str | os.PathLike[str] | None = None, splits: Sequence[str] = ()
) -> list[Prediction]:
    """Reads predictions, adds the references of a manifest (list of images) or features, and selects splits.

    Without `manifest`, the source's own references are kept. Without `splits`, all splits are selected.

    Raises:
        DatasetError: a dataset or file cannot be read, or no prediction is in these splits.
    """
    predictions = read_predictions(source)
    if manifest is not None:
        predictions = join_references(predictions, open_references(manifest))
    return select_splits(predictions, splits, os.fspath(source))


def read_predictions(source: str | os.PathLike[str]) -> list[Prediction]:
    """Reads captions, in order, from a complete captions dataset or a JSON file in COCO's or NeuralTalk's format.

    Raises:
        DatasetError: the source does not exist, has a different format, or contains two captions for one image.
        StorageError: the storage failed or refused the request.
    """
    address = os.fspath(source)
    if is_dataset(address):
        return _read_dataset(open_dataset(address, "captions").require_complete())
    location = locate(address)
    if location.find_type() is None:
        raise DatasetError(f"{address} does not exist; expected a captions dataset or a JSON file of results")
    document = load_json(location)
    if isinstance(document, list):
        predictions = [_parse_coco_entry(entry, f"{address}, [{index}]") for index, entry in enumerate(document)]
    elif isinstance(document, dict) and isinstance(document.get("imgblobs"), list):
        entries = document["imgblobs"]
        predictions = [
            _parse_neuraltalk_entry(entry, f"{address}, imgblobs[{index}]") for index, entry in enumerate(entries)
        ]
    else:
        raise DatasetError(
            f"{address}: expected COCO's results, a list of image_id and caption, or NeuralTalk's result_struct.json, "
            f"an object with imgblobs; got {'an object' if isinstance(document, dict) else type(document).__name__}"
        )
    if (repeated := find_repeated(prediction.image_id for prediction in predictions)) is not None:
        raise DatasetError(f"{address}: image {repeated} has two captions; expected one per image")
    return predictions


def find_repeated(image_ids: Iterable[str]) -> str | None:
    """Returns the first id that occurs more than once."""
    return next((image_id for image_id, count in Counter(image_ids).items() if count > 1), None)


def is_dataset(source: str | os.PathLike[str]) -> bool:
    """Returns whether a source of captions is a dataset instead of a JSON file."""
    return get_uncompressed_extension(os.fspath(source)) != ".json"


def _read_dataset(dataset: ShardedDataset) -> list[Prediction]:
    columns = ["image_id", "uri", "split", "caption", "log_prob", "image_text_score", "candidates"]
    return [
        Prediction.from_row(row)
        for shard in range(dataset.shards)
        for rows in dataset.read_batches(shard, columns)
        for row in rows.to_pylist()
    ]


def _parse_coco_entry(value: object, origin: str) -> Prediction:
    entry = parse_object(value, origin)
    return Prediction(parse_id(entry.get("image_id"), origin, "image_id"), _parse_caption(entry, "caption", origin))


def _parse_neuraltalk_entry(value: object, origin: str) -> Prediction:
    entry = parse_object(value, origin)
    candidate = parse_object(entry.get("candidate"), f"{origin}, candidate")
    text, log_prob = _parse_caption(candidate, "text", f"{origin}, candidate"), candidate.get("logprob")
    if log_prob is not None and (isinstance(log_prob, bool) or not isinstance(log_prob, int | float)):
        raise DatasetError(f"{origin}, candidate: logprob: expected a number, got {describe_value(log_prob)}")
    id_field = "imgid" if "imgid" in entry else "img_path"
    references = parse_list(entry.get("references", []), origin, "references")
    return Prediction(
        image_id=parse_id(entry.get(id_field), origin, id_field),
        caption=text,
        uri=parse_optional(parse_text, entry.get("img_path"), origin, "img_path"),
        log_prob=None if log_prob is None else float(log_prob),
        candidates=() if log_prob is None else ((text, float(log_prob)),),
        references=tuple(
            _parse_reference(reference, f"{origin}, references[{index}]") for index, reference in enumerate(references)
        ),
    )


def _parse_reference(value: object, origin: str) -> str:
    return _parse_caption(parse_object(value, origin), "text", origin)


def _parse_caption(entry: Mapping[str, Any], field: str, origin: str) -> str:
    value = entry.get(field)
    if not isinstance(value, str) or not is_unicode(value):
        raise DatasetError(f"{origin}: {field}: expected valid Unicode text, got {describe_value(value)}")
    return value


def open_references(address: str | os.PathLike[str]) -> ShardedDataset:
    """Opens a complete dataset with references: a manifest, or features, which contain the columns of their manifest.

    Raises:
        DatasetError: the dataset is incomplete, or contains no references.
    """
    dataset = open_dataset(address).require_complete()
    if "captions" not in dataset.schema.names:
        raise DatasetError(
            f"{dataset.folder.uri}: expected a dataset with references (manifest or features), got {dataset.kind}; "
            "use the output of prepare, extract-features or import-features"
        )
    return dataset


def join_references(predictions: Iterable[Prediction], manifest: ShardedDataset) -> list[Prediction]:
    """Adds the uri, split and references from the manifest to the predictions whose images are in the manifest."""
    by_id = {prediction.image_id: prediction for prediction in predictions}
    for shard in range(manifest.shards):
        for rows in manifest.read_batches(shard, ["image_id", "uri", "split", "captions"]):
            for row in rows.to_pylist():
                if prediction := by_id.get(row["image_id"]):
                    references = tuple(row["captions"]) or prediction.references
                    by_id[row["image_id"]] = replace(
                        prediction, uri=row["uri"], split=row["split"], references=references
                    )
    return list(by_id.values())


def find_images_without_caption(
    predictions: Iterable[Prediction], manifest: ShardedDataset, splits: Sequence[str] = ()
) -> tuple[list[str], int]:
    """Returns the ids of the images with references but no prediction, and the number of all images with references.

    Only these splits are searched or, by default, those of the predictions.
    """
    predicted = {prediction.image_id: prediction.split for prediction in predictions}
    searched = add_split_aliases(splits or predicted.values())
    missing, count = [], 0
    for shard in range(manifest.shards):
        for rows in manifest.read_batches(shard, ["image_id", "split", "captions"]):
            for row in rows.to_pylist():
                if row["split"] in searched and row["captions"]:
                    count += 1
                    if row["image_id"] not in predicted:
                        missing.append(row["image_id"])
    return missing, count


def select_splits(predictions: Sequence[Prediction], splits: Sequence[str], source: str) -> list[Prediction]:
    """Selects the predictions in these splits, or all predictions if `splits` is empty.

    Raises:
        DatasetError: no prediction is in these splits.
    """
    names = add_split_aliases(splits)
    selected = [prediction for prediction in predictions if not splits or prediction.split in names]
    if not selected:
        known = ", ".join(sorted({prediction.split or "(none)" for prediction in predictions})) or "none"
        raise DatasetError(f"{source}: no captions in split {' or '.join(splits) or '(any)'}; its splits are {known}")
    return selected


def to_coco_results(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Returns captions in COCO's results format; see `to_coco_ids`."""
    ids = to_coco_ids([prediction.image_id for prediction in predictions])
    return [
        {"image_id": image_id, "caption": prediction.caption}
        for image_id, prediction in zip(ids, predictions, strict=True)
    ]


def to_coco_ids(image_ids: Sequence[str]) -> Sequence[int | str]:
    """Converts ids to integers, as in COCO, if all are integers of 64 bits. Otherwise, returns them unchanged."""
    return [int(image_id) for image_id in image_ids] if all(map(_is_integer, image_ids)) else image_ids


def _is_integer(image_id: str) -> bool:
    return _INTEGER_ID.fullmatch(image_id) is not None and int(image_id) <= _MAX_INTEGER_ID


def to_result_struct(predictions: Sequence[Prediction], params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of NeuralTalk's `result_struct.json`. `params` are the parameters of the run."""
    blobs = [
        {
            "img_path": prediction.uri,
            "imgid": int(prediction.image_id) if _is_integer(prediction.image_id) else prediction.image_id,
            "references": [{"text": text} for text in prediction.references],
            "candidate": {"text": prediction.caption, "logprob": prediction.log_prob},
        }
        for prediction in predictions
    ]
    return {"params": dict(params), "checkpoint_params": {}, "imgblobs": blobs}
