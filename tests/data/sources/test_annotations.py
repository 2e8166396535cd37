from pathlib import Path
from typing import Any

import pytest

from captionlib.data.sources.formats import detect_common_format, detect_format
from captionlib.errors import ConfigError, DatasetError
from tests.data.sources.source_files import read, write_empty_files, write_json


def make_coco(*images: tuple[int, str, list[str]]) -> dict[str, Any]:
    return {
        "info": {},
        "images": [{"id": number, "file_name": name, "height": 1, "width": 1} for number, name, _ in images],
        "annotations": [
            {"id": 100 * number + at, "image_id": number, "caption": caption}
            for number, _, captions in images
            for at, caption in enumerate(captions)
        ],
    }


def test_coco_takes_split_and_image_folder_from_the_file_name(tmp_path: Path) -> None:
    write_empty_files(tmp_path, ["train2014/a.jpg", "val2014/b.jpg"])
    train = write_json(tmp_path / "annotations/captions_train2014.json", make_coco((9, "a.jpg", ["one ", "two"])))
    val = write_json(
        tmp_path / "annotations/captions_val2014.json", make_coco((3, "b.jpg", []), (4, "c.jpg", ["three"]))
    )
    rows, _ = read(train, val)
    assert [(row.image_id, row.split, row.captions) for row in rows] == [
        ("9", "train", ("one", "two")),
        ("3", "val", ()),
        ("4", "val", ("three",)),
    ]
    assert [row.uri for row in rows] == [
        f"{tmp_path}/{name}" for name in ("train2014/a.jpg", "val2014/b.jpg", "val2014/c.jpg")
    ]
    # explicit options override both
    rows, _ = read(val, image_root=str(tmp_path / "val2014"), default_split="x")
    assert (rows[0].uri, rows[0].split) == (f"{tmp_path}/val2014/b.jpg", "x")


def test_coco_counts_captions_of_unlisted_images(tmp_path: Path) -> None:
    document = make_coco((1, "a.jpg", ["one"]), (2, "b.jpg", ["two"]))
    del document["images"][1]
    rows, skipped = read(write_json(tmp_path / "captions.json", document))
    assert [row.image_id for row in rows] == ["1"]
    assert skipped == {"captions of an unlisted image": 1}


def test_coco_rejects_instances_without_captions(tmp_path: Path) -> None:
    document = make_coco((1, "a.jpg", ["one"]))
    del document["annotations"][0]["caption"]
    path = write_json(tmp_path / "instances_val2014.json", document)
    with pytest.raises(DatasetError, match=r"with the key caption, got id, image_id; use COCO's captions_\*\.json"):
        read(path)


def test_karpathy_keeps_all_four_splits_and_prefers_cocos_id(tmp_path: Path) -> None:
    images = [
        {
            "imgid": number,
            "cocoid": 1000 + number,
            "filepath": "val2014",
            "filename": f"{number}.jpg",
            "split": split,
            "sentences": [{"raw": f"Sentence {number}.", "tokens": ["sentence"]}, {"tokens": ["a", "dog"]}],
        }
        for number, split in enumerate(["train", "restval", "val", "test"])
    ]
    path = write_json(tmp_path / "dataset.json", {"dataset": "coco", "images": images})
    rows, _ = read(path, image_root=str(tmp_path / "coco"))
    assert [(row.image_id, row.split) for row in rows] == [
        ("1000", "train"),
        ("1001", "restval"),
        ("1002", "val"),
        ("1003", "test"),
    ]
    assert rows[1].captions == ("Sentence 1.", "a dog")
    assert rows[1].uri == f"{tmp_path}/coco/val2014/1.jpg"
    for image in images:
        del image["cocoid"]
    assert [row.image_id for row in read(write_json(path, {"images": images}))[0]] == ["0", "1", "2", "3"]


def test_karpathy_names_the_entry_that_lacks_a_field(tmp_path: Path) -> None:
    path = write_json(tmp_path / "dataset.json", {"images": [{"imgid": 1, "sentences": []}]})
    with pytest.raises(DatasetError, match=r"dataset\.json, images\[0\]: expected filename as text, got no value"):
        read(path)


FLICKR = """1.jpg#0\tA dog .\n1.jpg#1\tA black dog .\n2.jpg#0\tTwo men .\n3.jpg.1#0\tNobody .\n"""


def test_flickr_uses_the_official_split_files_beside_the_captions(tmp_path: Path) -> None:
    path = tmp_path / "Flickr8k.token.txt"
    path.write_text(FLICKR)
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("1.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("2.jpg\n9.jpg\n")
    rows, skipped = read(path, image_root=str(tmp_path / "Images"))
    assert [(row.image_id, row.split, row.captions) for row in rows] == [
        ("1.jpg", "train", ("A dog .", "A black dog .")),
        ("2.jpg", "dev", ("Two men .",)),
    ]
    assert rows[0].uri == f"{tmp_path}/Images/1.jpg"
    assert skipped == {"not in any split file": 1, "in a split file, but without captions": 1}


def test_flickr_matches_names_without_extension_in_custom_split_files(tmp_path: Path) -> None:
    path = tmp_path / "results.token"
    path.write_text(FLICKR)
    (tmp_path / "custom.txt").write_text("1\n2\n3\n")
    rows, _ = read(path, split_files={"custom": str(tmp_path / "custom.txt")})
    assert [(row.image_id, row.split) for row in rows] == [(f"{number}.jpg", "custom") for number in (1, 2, 3)]


def test_flickr_rejects_an_image_in_two_splits(tmp_path: Path) -> None:
    path = tmp_path / "results.token"
    path.write_text(FLICKR)
    (tmp_path / "one.txt").write_text("1.jpg\n")
    with pytest.raises(DatasetError, match=r"expected each image in one split, got 1 in a and in b"):
        read(path, split_files={"a": str(tmp_path / "one.txt"), "b": str(tmp_path / "one.txt")})


def test_flickr_names_the_malformed_line(tmp_path: Path) -> None:
    path = tmp_path / "results.token"
    path.write_text(FLICKR + "no tab here\n")
    assert read(path)[1] == {"line in a different format": 1}
    with pytest.raises(DatasetError, match=r"line 5: expected NAME\.jpg#NUMBER, a tab and a caption, got 'no tab here"):
        read(path, strict=True)


def test_detection_rejects_sources_of_two_formats(tmp_path: Path) -> None:
    path = write_json(tmp_path / "captions.json", make_coco((1, "a.jpg", ["one"])))
    write_empty_files(tmp_path, ["images/a.jpg"])
    with pytest.raises(ConfigError, match=r"got several: .*coco, .*folder; prepare each separately"):
        detect_common_format([str(path), str(tmp_path / "images")])


def test_detection_rejects_unknown_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got other JSON; set --format to coco, karpathy or table"):
        detect_format(write_json(tmp_path / "x.json", {"images": [1]}))


def test_invalid_json_is_reported_with_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text('{"images": [{"file_name": "a.jpg",\n "id": }]}')
    with pytest.raises(DatasetError, match=r"captions\.json, line 2, column \d+: not JSON"):
        read(path)
