import json
from pathlib import Path

from click.testing import CliRunner

from jobs.cli import captionlib
from tests.data.ingestion.test_neuraltalk import IMGIDS, write_json, write_mat
from tests.evaluation.test_caption_scores import CAPTIONS, REFERENCES, write_captions, write_manifest


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(captionlib, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_import_features_prints_a_summary(tmp_path: Path) -> None:
    files = write_json(tmp_path, IMGIDS), write_mat(tmp_path, "5")
    output = run("import-features", *files, "-o", tmp_path / "features", "--set", "shard_size=2", "--no-progress")
    assert output.startswith(f"{tmp_path}/features: 3 rows in 2 shards")


def test_export_captions_writes_neuraltalk_and_coco_formats(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    write_manifest(tmp_path / "manifest", REFERENCES)
    struct, results = tmp_path / "result_struct.json", tmp_path / "results.json"
    output = run("export-captions", tmp_path / "captions", "-o", struct, "-m", tmp_path / "manifest")
    assert output == f"{struct}: 4 captions in NeuralTalk's format\n"
    assert {
        str(blob["imgid"]): (blob["candidate"]["text"], [reference["text"] for reference in blob["references"]])
        for blob in json.loads(struct.read_text())["imgblobs"]
    } == {i: (CAPTIONS[i], REFERENCES[i]) for i in CAPTIONS}
    run("export-captions", tmp_path / "captions", "-o", results, "--split", "val")
    assert {row["image_id"]: row["caption"] for row in json.loads(results.read_text())} == CAPTIONS
    explicit = run("export-captions", tmp_path / "captions", "-o", tmp_path / "x.json", "--format", "neuraltalk")
    assert explicit.endswith("in NeuralTalk's format\n")
