import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import features_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DatasetError, StorageError
from captionlib.evaluation.predictions import (
    Prediction,
    find_images_without_caption,
    join_references,
    load_predictions,
    read_predictions,
    select_splits,
    to_coco_results,
    to_result_struct,
)
from tests.evaluation.test_caption_scores import CAPTIONS, REFERENCES, write_captions, write_manifest


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_captions_are_joined_with_references(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS, split="")
    manifest = write_manifest(tmp_path / "manifest", REFERENCES)
    joined = join_references(read_predictions(tmp_path / "captions"), manifest)
    assert [prediction.image_id for prediction in joined] == list(CAPTIONS)
    assert {prediction.image_id: prediction.references for prediction in joined} == {
        i: tuple(REFERENCES[i]) for i in CAPTIONS
    }
    assert {prediction.split for prediction in joined} == {"val"}


def test_features_serve_as_references(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS, split="")
    manifest = write_manifest(tmp_path / "manifest", REFERENCES)
    schema = features_schema(2, "float32")
    features = create_dataset(tmp_path / "features", "features", schema, config={}, shards=manifest.shards)
    for shard in range(manifest.shards):
        rows = manifest.read(shard)
        with write_shard(features, shard, rows.num_rows) as writer:
            vectors = pa.FixedSizeListArray.from_arrays(pa.array([0.0] * 2 * rows.num_rows, pa.float32()), 2)
            table = rows.append_column(schema.field("features"), vectors)
            writer.write(table.combine_chunks().to_batches()[0])
    features.finish()
    expected = load_predictions(tmp_path / "captions", tmp_path / "manifest")
    assert load_predictions(tmp_path / "captions", tmp_path / "features") == expected
    with pytest.raises(
        DatasetError, match=r"expected a dataset with references \(manifest or features\), got captions"
    ):
        load_predictions(tmp_path / "captions", tmp_path / "captions")


@pytest.mark.parametrize(("split", "name"), [("val", "dev"), ("dev", "val")])
def test_val_and_dev_select_each_other(split: str, name: str) -> None:
    assert len(select_splits([Prediction("1", "a", split=split), Prediction("2", "a")], [name], "captions")) == 1


def test_split_without_captions_lists_the_known_splits() -> None:
    with pytest.raises(DatasetError, match=r"captions: no captions in split test; its splits are \(none\), val"):
        select_splits([Prediction("1", "a", split="val"), Prediction("2", "a")], ["test"], "captions")


@pytest.mark.parametrize(("ids", "written"), [(["391895", "0"], [391895, 0]), (["1", "007"], ["1", "007"])])
def test_coco_results_round_trip(tmp_path: Path, ids: list[str], written: list[int | str]) -> None:
    predictions = [Prediction(image_id, f"a café {image_id}") for image_id in ids]
    results = to_coco_results(predictions)
    assert results == [{"image_id": i, "caption": one.caption} for i, one in zip(written, predictions, strict=True)]
    assert read_predictions(write(tmp_path / "results.json", results)) == predictions


def test_result_struct_round_trip(tmp_path: Path) -> None:
    predictions = [
        Prediction("7", "a dog", "photos/7.jpg", "", -3.5, (("a dog", -3.5),), ("A dog runs.",)),
        Prediction("8", "a cat", "photos/8.jpg"),
    ]
    struct = to_result_struct(predictions, {"beam_size": 5})
    assert struct["params"] == {"beam_size": 5}
    assert struct["imgblobs"][0] == {
        "img_path": "photos/7.jpg",
        "imgid": 7,
        "references": [{"text": "A dog runs."}],
        "candidate": {"text": "a dog", "logprob": -3.5},
    }
    assert read_predictions(write(tmp_path / "result_struct.json", struct)) == predictions


@pytest.mark.parametrize("image_id", ["0042", "-1", "٤٢", str(2**63), "9" * 5000])
def test_ids_that_are_not_integers_stay_text(image_id: str, tmp_path: Path) -> None:
    predictions = [Prediction("42", "a dog", "a.jpg"), Prediction(image_id, "a cat", "b.jpg")]
    struct = to_result_struct(predictions, {})
    assert [blob["imgid"] for blob in struct["imgblobs"]] == [42, image_id]
    assert read_predictions(write(tmp_path / "result_struct.json", struct)) == predictions
    assert [result["image_id"] for result in to_coco_results(predictions)] == ["42", image_id]


def test_result_struct_without_ids_uses_paths(tmp_path: Path) -> None:
    blob = {"img_path": "a/b.jpg", "candidate": {"text": "a dog", "logprob": -2}}
    (prediction,) = read_predictions(write(tmp_path / "result_struct.json", {"imgblobs": [blob]}))
    assert (prediction.image_id, prediction.log_prob, prediction.references) == ("a/b.jpg", -2.0, ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image_id": 1}], r"r.json, \[0\]: caption: expected valid Unicode text, got no value"),
        ([{"image_id": 1.5, "caption": "a"}], r"r.json, \[0\]: expected"),
        ([{"image_id": True, "caption": "a"}], r"r.json, \[0\]: expected"),
        ([{"image_id": 1, "caption": None}], r"r.json, \[0\]: caption: expected"),
        (["a dog"], r"r.json, \[0\]: expected"),
        (
            [{"image_id": 1, "caption": "a \ud83d dog"}],
            r"r.json, \[0\]: caption: expected valid Unicode text, got text",
        ),
        ({"imgblobs": [{"imgid": None, "candidate": {"text": "a"}}]}, r"imgblobs\[0\]: expected imgid as text"),
        (
            {"imgblobs": [{"imgid": 1, "candidate": {"text": "a", "logprob": []}}]},
            "logprob: expected a number, got list",
        ),
        (
            {"imgblobs": [{"imgid": 1, "candidate": {"text": "a"}, "references": [{"text": 3}]}]},
            r"imgblobs\[0\], references\[0\]: text: expected valid Unicode text, got number 3",
        ),
        ([{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}], "image 1 has two captions"),
        ({"imgblobs": [{"imgid": 1}]}, r"imgblobs\[0\], candidate: expected an object, got no value"),
        ({"images": []}, "expected COCO's results, a list .* got an object"),
        (3, "got int"),
    ],
)
def test_invalid_file_is_rejected_with_the_position(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_predictions(write(tmp_path / "r.json", content))


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist; expected a captions dataset or a JSON file"):
        read_predictions(tmp_path / "r.json")


def test_failure_of_the_storage_is_not_a_missing_file(tmp_path: Path) -> None:
    (path := tmp_path / "loop.json").symlink_to("loop.json")
    with pytest.raises(StorageError, match=r"loop\.json cannot be accessed: Too many levels of symbolic links"):
        read_predictions(path)


def test_images_without_a_caption_are_those_with_references_in_the_split(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "manifest", {"1": ["x"], "2": ["y"], "3": ["z"], "without references": []})
    joined = join_references([Prediction("1", "a"), Prediction("unlisted", "b")], manifest)
    assert find_images_without_caption(joined, manifest) == (["2", "3"], 3)
    assert find_images_without_caption(joined, manifest, ["val"]) == (["2", "3"], 3)
    assert find_images_without_caption(joined, manifest, ["train"]) == ([], 0)


@pytest.mark.parametrize("raw", ["[" * 3000, '[{"image_id": ' + "1" * 5000 + ', "caption": "x"}]'])
def test_extreme_json_is_rejected(tmp_path: Path, raw: str) -> None:
    (tmp_path / "r.json").write_text(raw)
    with pytest.raises(DatasetError, match=r"r\.json"):
        read_predictions(tmp_path / "r.json")
