import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from captionlib.data.ingestion.prepare import PrepareConfig, prepare
from captionlib.errors import DatasetError, QueryError
from jobs.cli import captionlib
from tests.evaluation.test_caption_scores import CAPTIONS, REFERENCES, write_captions, write_manifest


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(captionlib, ["export", *map(str, arguments), "--no-progress"], catch_exceptions=False)


def export(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def read_results(path: Path) -> dict[str | int, str]:
    return {row["image_id"]: row["caption"] for row in json.loads(path.read_text())}


def test_neuraltalk_file_contains_the_references_of_the_manifest(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    write_manifest(tmp_path / "manifest", REFERENCES)
    struct = tmp_path / "struct.json"
    output = export(tmp_path / "captions", "--to", "neuraltalk", "-o", struct, "-m", tmp_path / "manifest")
    assert output == f"{struct}: 4 images in NeuralTalk's format\n"
    assert {
        str(blob["imgid"]): (blob["candidate"]["text"], [reference["text"] for reference in blob["references"]])
        for blob in json.loads(struct.read_text())["imgblobs"]
    } == {i: (CAPTIONS[i], REFERENCES[i]) for i in CAPTIONS}
    export(struct, "--to", "coco", "-o", tmp_path / "results.json")
    assert {str(i): caption for i, caption in read_results(tmp_path / "results.json").items()} == CAPTIONS


def test_coco_results_contain_the_captions_of_a_split(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    export(tmp_path / "captions", "--to", "coco", "-o", tmp_path / "results.json", "--split", "val")
    assert read_results(tmp_path / "results.json") == CAPTIONS
    with pytest.raises(DatasetError, match="expected at least one selected image, got none; check --split, --where"):
        export(tmp_path / "captions", "--to", "coco", "-o", tmp_path / "results.json", "--split", "test")


def test_coco_captions_of_a_manifest_are_read_by_prepare(tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest", {"1": ["a red field", "all red"], "2": ["a blue field"], "3": []})
    file = tmp_path / "captions_val2014.json"
    export(tmp_path / "manifest", "--to", "coco", "-o", file)
    document = json.loads(file.read_text())
    assert document["images"] == [{"id": number, "file_name": str(number)} for number in (1, 2, 3)]
    assert [(one["id"], one["image_id"], one["caption"]) for one in document["annotations"]] == [
        (0, 1, "a red field"),
        (1, 1, "all red"),
        (2, 2, "a blue field"),
    ]
    prepared = prepare([str(file)], tmp_path / "prepared", PrepareConfig(check_images=False))
    assert (prepared.images, prepared.captions) == (3, 3)


@pytest.mark.parametrize("to", ["coco", "txt"])
def test_where_selects_rows_by_their_columns(tmp_path: Path, to: str) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    where = "image_id = '10' -- a comment"
    result = invoke(tmp_path / "captions", "--to", to, "-o", tmp_path / "out", "--where", where)
    if to == "coco":
        assert read_results(tmp_path / "out") == {10: CAPTIONS["10"]}
    else:  # the example has no image files
        assert "1 images were not exported" in result.stderr


@pytest.mark.parametrize(
    ("where", "message"),
    [("nothing = 1", "nothing"), ("true) UNION (SELECT 'x'", "where: "), ("", "where: ")],
)
def test_invalid_condition_is_rejected(tmp_path: Path, where: str, message: str) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    with pytest.raises(QueryError, match=message) as raised:
        export(tmp_path / "captions", "--to", "coco", "-o", tmp_path / "out.json", "--where", where)
    assert "Expected a condition over the columns of" in str(raised.value)
    assert not (tmp_path / "out.json").exists()


def test_same_image_in_two_datasets_is_rejected(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_captions(tmp_path / name, CAPTIONS)
    with pytest.raises(DatasetError, match="expected one row per image, got two for image"):
        export(tmp_path / "a", tmp_path / "b", "--to", "coco", "-o", tmp_path / "out.json")


def test_manifest_is_refused_for_folders_of_images(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    result = invoke(tmp_path / "captions", "--to", "txt", "-o", tmp_path / "out", "-m", tmp_path / "captions")
    assert result.exit_code == 2
    assert "--manifest is for --to coco and neuraltalk" in result.output
