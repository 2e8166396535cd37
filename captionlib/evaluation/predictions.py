"""Captions to be judged, wherever they stand: in `captions/`, in COCO's results JSON, or in NeuralTalk's.

COCO's results, as its evaluation server takes them: `[{"image_id": 391895, "caption": "a man rides a bike"}, ...]`.
NeuralTalk's `result_struct.json`: `{"imgblobs": [{"img_path", "imgid", "references": [{"text"}], "candidate": {"text",
"logprob"}}, ...]}` beside the parameters of its run; it brings its references along.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.sources.locations import get_text_extension, load_json, locate
from captionlib.errors import DatasetError

__all__ = [
    "Prediction",
    "is_dataset",
    "join_references",
    "prediction_of",
    "read_predictions",
    "select_splits",
    "to_coco_results",
    "to_result_struct",
]


@dataclass(frozen=True)
class Prediction:
    """What a model said of an image.

    Attributes:
        image_id: the image.
        caption: the most likely sentence.
        uri: where the image is; empty where it is not known.
        split: that the image belongs to; empty where it is not known.
        log_prob: of the caption, where it is known.
        candidates: captions with their log-probabilities, the best first.
        references: what people say.
    """

    image_id: str
    caption: str
    uri: str = ""
    split: str = ""
    log_prob: float | None = None
    candidates: tuple[tuple[str, float], ...] = ()
    references: tuple[str, ...] = ()


def read_predictions(source: str | os.PathLike[str]) -> list[Prediction]:
    """The captions of a complete captions dataset, or of a JSON file of COCO's or NeuralTalk's, in their order.

    Raises:
        DatasetError: it is none of these, or has two captions of an image.
    """
    address = os.fspath(source)
    if is_dataset(address):
        return _read_dataset(open_dataset(address, "captions").require_complete())
    location = locate(address)
    if not location.fs.exists(location.path):
        raise DatasetError(f"{address} does not exist; expected a captions dataset, or a JSON file of results")
    document = load_json(location)
    if isinstance(document, list):
        found = _read_entries(document, "", address, _from_coco)
    elif isinstance(document, dict) and isinstance(document.get("imgblobs"), list):
        found = _read_entries(document["imgblobs"], "imgblobs", address, _from_neuraltalk)
    else:
        raise DatasetError(
            f"{address}: expected COCO's results, a list of image_id and caption, or NeuralTalk's result_struct.json, "
            f"an object with imgblobs; got {'an object' if isinstance(document, dict) else type(document).__name__}"
        )
    seen: set[str] = set()
    for one in found:
        if one.image_id in seen:
            raise DatasetError(f"{address}: image {one.image_id} has two captions; expected one an image")
        seen.add(one.image_id)
    return found


def is_dataset(source: str | os.PathLike[str]) -> bool:
    """Whether captions stand in a dataset there, rather than in a JSON file."""
    return get_text_extension(os.fspath(source)) != ".json"


def prediction_of(row: Mapping[str, Any]) -> Prediction:
    """What a row of `captions/` says, from plain values."""
    return Prediction(
        image_id=row["image_id"],
        caption=row["caption"],
        uri=row["uri"],
        split=row["split"],
        log_prob=row["log_prob"],
        candidates=tuple((candidate["caption"], candidate["log_prob"]) for candidate in row["candidates"]),
    )


def _read_dataset(dataset: ShardedDataset) -> list[Prediction]:
    columns = ["image_id", "uri", "split", "caption", "log_prob", "candidates"]
    return [
        prediction_of(row)
        for shard in range(dataset.shards)
        for rows in dataset.read_batches(shard, columns)
        for row in rows.to_pylist()
    ]


def _read_entries(
    entries: Sequence[Any], name: str, address: str, read: Callable[[Mapping[str, Any]], Prediction]
) -> list[Prediction]:
    found = []
    for number, entry in enumerate(entries):
        try:
            found.append(read(entry))
        except (KeyError, TypeError, ValueError) as error:
            expected = "candidate.text and imgid" if name else "image_id and caption"
            raise DatasetError(
                f"{address}, {name}[{number}]: expected an object with {expected}, got {entry!r:.80}"
            ) from error
    return found


def _from_coco(entry: Mapping[str, Any]) -> Prediction:
    return Prediction(_to_id(entry["image_id"]), _to_text(entry["caption"]))


def _from_neuraltalk(entry: Mapping[str, Any]) -> Prediction:
    text, log_prob = _to_text(entry["candidate"]["text"]), entry["candidate"].get("logprob")
    path = str(entry.get("img_path", ""))
    return Prediction(
        image_id=_to_id(entry["imgid"] if "imgid" in entry else entry["img_path"]),
        caption=text,
        uri=path,
        log_prob=None if log_prob is None else float(log_prob),
        candidates=() if log_prob is None else ((text, float(log_prob)),),
        references=tuple(_to_text(reference["text"]) for reference in entry.get("references", ())),
    )


def _to_id(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError("an image id is a number or a text")
    return str(value)


def _to_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a caption is a text")
    return value


def join_references(predictions: Iterable[Prediction], manifest: ShardedDataset) -> list[Prediction]:
    """Predictions with the split, the sentences and the place of their image in a manifest, where it has it."""
    found = {one.image_id: one for one in predictions}
    for shard in range(manifest.shards):
        for rows in manifest.read_batches(shard, ["image_id", "uri", "split", "captions"]):
            for row in rows.to_pylist():
                if one := found.get(row["image_id"]):
                    found[one.image_id] = replace(
                        one, uri=row["uri"], split=row["split"], references=tuple(row["captions"]) or one.references
                    )
    return list(found.values())


def select_splits(predictions: Sequence[Prediction], splits: Sequence[str], source: str) -> list[Prediction]:
    """Those of some splits, or all, if none is given.

    Raises:
        DatasetError: there is none.
    """
    kept = [one for one in predictions if not splits or one.split in splits]
    if not kept:
        there = ", ".join(sorted({one.split or "(none)" for one in predictions})) or "none"
        raise DatasetError(f"{source}: no captions in split {' or '.join(splits) or '(any)'}; its splits are {there}")
    return kept


def to_coco_results(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """COCO's results: ids are numbers, as COCO's are, where all of them can be."""
    numeric = all(one.image_id.isdecimal() and str(int(one.image_id)) == one.image_id for one in predictions)
    return [{"image_id": int(one.image_id) if numeric else one.image_id, "caption": one.caption} for one in predictions]


def to_result_struct(predictions: Sequence[Prediction], params: Mapping[str, Any]) -> dict[str, Any]:
    """NeuralTalk's `result_struct.json`, as its page of predictions reads it.

    Args:
        predictions: what was said.
        params: of the run, plain values.
    """
    blobs = [
        {
            "img_path": one.uri,
            "imgid": int(one.image_id) if one.image_id.isdecimal() else one.image_id,
            "references": [{"text": text} for text in one.references],
            "candidate": {"text": one.caption, "logprob": one.log_prob},
        }
        for one in predictions
    ]
    return {"params": dict(params), "checkpoint_params": {}, "imgblobs": blobs}
