from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from captionlib.data.images.decoding import SizeLimit
from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import captions_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DatasetError
from captionlib.evaluation.image_display import ImageDisplay, build_image_display, read_image_display
from captionlib.models.families.model import describe_pixel_input
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
WEIGHTS = {
    "a": [[0.125, 0.25, 0.5, 0.125], [0.0, 1.0, 0.0, 0.0]],
    "b": [[0.25, 0.25, 0.25, 0.25]],
    "c": [[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0]],
}
EXPECTED = {
    "a": [[[64, 128], [255, 64]], [[0, 255], [0, 0]]],
    "c": [[[255, 255], [0, 0]], [[255, 255], [255, 255]], [[0, 0], [0, 255]]],
}


def make_row(image_id: str, weights: list[list[float]]) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "uri": f"{image_id}.jpg",
        "split": "val",
        "caption": " ".join(["dog"] * (len(weights) - 1)),
        "log_prob": -1.0,
        "tokens": len(weights),
        "candidates": [],
        "attention": weights,
    }


def write_weights(folder: Path, weights: dict[str, list[list[float]]], encoder: dict[str, Any] = ENCODER) -> Path:
    """Writes one shard per image."""
    schema = captions_schema(len(next(iter(weights.values()))[0]))
    dataset = create_dataset(folder, "captions", schema, config={"encoder": encoder}, shards=len(weights))
    for shard, (image_id, image_weights) in enumerate(weights.items()):
        with write_shard(dataset, shard, 1) as writer:
            writer.write(pa.RecordBatch.from_pylist([make_row(image_id, image_weights)], schema))
    dataset.finish()
    return folder


def to_lists(view: ImageDisplay) -> dict[str, Any]:
    assert all(maps.dtype == np.uint8 for maps in view.attention_maps.values())
    return {image_id: maps.tolist() for image_id, maps in view.attention_maps.items()}


def test_maps_are_scaled_to_the_peak_of_each_token(tmp_path: Path) -> None:
    view = read_image_display(write_weights(tmp_path / "captions", WEIGHTS), ["a", "c"])
    assert to_lists(view) == EXPECTED
    assert view.preprocessing is not None
    assert view.preprocessing.resize_size == 256


def test_rows_in_memory_give_the_same_maps() -> None:
    assert to_lists(build_image_display([make_row(name, WEIGHTS[name]) for name in EXPECTED], ENCODER)) == EXPECTED


def test_reading_stops_after_the_last_requested_image(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "captions", WEIGHTS)
    (folder / "part-00002.parquet").unlink()
    assert list(read_image_display(folder, ["a"]).attention_maps) == ["a"]


def test_captions_without_attention_give_an_empty_view(tmp_path: Path) -> None:
    assert read_image_display("results.json", ["a"]) == ImageDisplay()
    write_captions(tmp_path / "captions", CAPTIONS)
    assert read_image_display(tmp_path / "captions", list(CAPTIONS)) == ImageDisplay()


@pytest.mark.parametrize("encoder", [{"weights": "imported"}, describe_pixel_input(SizeLimit(1000))])
def test_imported_features_and_models_that_resize_images_have_no_crop(tmp_path: Path, encoder: dict[str, Any]) -> None:
    folder = write_weights(tmp_path / "captions", WEIGHTS, encoder)
    assert read_image_display(folder, ["b"]).preprocessing is None


def test_maps_that_are_not_square_are_rejected(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "captions", {"a": [[0.25, 0.25, 0.5]]})
    with pytest.raises(DatasetError, match="expected square maps, got 3 positions"):
        read_image_display(folder, ["a"])
