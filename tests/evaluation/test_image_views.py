from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import captions_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DatasetError
from captionlib.evaluation.image_views import Sight, read_sight, sight_of
from tests.evaluation.test_caption_scores import CAPTIONS, write_captions

ENCODER = {
    "preprocessing": {
        "resize_size": 256,
        "crop_size": 224,
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
    }
}
LOOKS = {
    "a": [[0.125, 0.25, 0.5, 0.125], [0.0, 1.0, 0.0, 0.0]],
    "b": [[0.25, 0.25, 0.25, 0.25]],
    "c": [[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0]],
}
EXPECTED = {
    "a": [[[64, 128], [255, 64]], [[0, 255], [0, 0]]],
    "c": [[[255, 255], [0, 0]], [[255, 255], [255, 255]], [[0, 0], [0, 255]]],
}


def row_of(image_id: str, looks: list[list[float]]) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "uri": f"{image_id}.jpg",
        "split": "val",
        "caption": " ".join(["dog"] * (len(looks) - 1)),
        "log_prob": -1.0,
        "tokens": len(looks),
        "candidates": [],
        "attention": looks,
    }


def write_looks(folder: Path, looks: dict[str, list[list[float]]], encoder: dict[str, Any] = ENCODER) -> Path:
    """A shard an image."""
    schema = captions_schema(len(next(iter(looks.values()))[0]))
    dataset = create_dataset(folder, "captions", schema, config={"encoder": encoder}, shards=len(looks))
    for shard, (image_id, some) in enumerate(looks.items()):
        with write_shard(dataset, shard, 1) as writer:
            writer.write(pa.RecordBatch.from_pylist([row_of(image_id, some)], schema))
    dataset.finish()
    return folder


def to_lists(sight: Sight) -> dict[str, Any]:
    assert all(maps.dtype == np.uint8 for maps in sight.maps.values())
    return {image_id: maps.tolist() for image_id, maps in sight.maps.items()}


def test_maps_reach_from_nothing_to_the_peak_of_each_word(tmp_path: Path) -> None:
    sight = read_sight(write_looks(tmp_path / "captions", LOOKS), ["a", "c"])
    assert to_lists(sight) == EXPECTED
    assert sight.preprocessing is not None
    assert sight.preprocessing.resize_size == 256


def test_rows_that_are_in_no_dataset_have_the_same_maps() -> None:
    assert to_lists(sight_of([row_of(name, LOOKS[name]) for name in EXPECTED], ENCODER)) == EXPECTED


def test_nothing_is_read_after_the_last_image_that_is_wanted(tmp_path: Path) -> None:
    folder = write_looks(tmp_path / "captions", LOOKS)
    (folder / "part-00002.parquet").unlink()
    assert list(read_sight(folder, ["a"]).maps) == ["a"]


def test_where_no_maps_were_kept_there_are_none(tmp_path: Path) -> None:
    assert read_sight("results.json", ["a"]) == Sight()
    write_captions(tmp_path / "captions", CAPTIONS)
    assert read_sight(tmp_path / "captions", list(CAPTIONS)) == Sight()


def test_imported_features_do_not_tell_what_was_seen(tmp_path: Path) -> None:
    folder = write_looks(tmp_path / "captions", LOOKS, {"weights": "imported"})
    assert read_sight(folder, ["b"]).preprocessing is None


def test_maps_of_an_unknown_shape_are_refused(tmp_path: Path) -> None:
    folder = write_looks(tmp_path / "captions", {"a": [[0.25, 0.25, 0.5]]})
    with pytest.raises(DatasetError, match="expected maps that are square, as encoders see squares, got 3 positions"):
        read_sight(folder, ["a"])
