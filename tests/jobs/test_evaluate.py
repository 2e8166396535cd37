import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from captionlib.errors import DatasetError
from captionlib.evaluation.predictions import Prediction, to_result_struct
from jobs.cli import captionlib
from tests.evaluation.test_caption_scores import CAPTIONS, REFERENCES, scores, write_captions, write_manifest


def evaluate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(captionlib, ["evaluate", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    write_captions(tmp_path / "captions", CAPTIONS)
    write_manifest(tmp_path / "manifest", REFERENCES)
    return tmp_path / "manifest"


def test_scores_are_printed_and_written(tmp_path: Path, manifest: Path) -> None:
    files = ["--per-image", tmp_path / "new" / "scores.parquet", "--results", tmp_path / "results.json"]
    result = evaluate(tmp_path / "captions", "-m", manifest, "--split", "val", "-o", tmp_path / "scores", *files)
    expected = scores()
    assert result.output.splitlines()[0] == f"{tmp_path}/captions: 4 images"
    low, high = expected.intervals["BLEU-1"]
    assert f"  BLEU-1               {expected.overall['BLEU-1']:.4f}   {low:.4f} to {high:.4f}" in result.output
    written = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert (written["images"], written["splits"], written["tokenizer"]) == (4, ["val"], "ptb")
    assert written["scores"] == {**expected.overall, "mean_length": written["scores"]["mean_length"]}
    assert written["intervals"]["CIDEr"] == list(expected.intervals["CIDEr"])
    assert written["counts"] == {"distinct_captions": 4, "vocabulary_size": 11}
    table = pq.read_table(tmp_path / "new" / "scores.parquet").to_pylist()
    assert {row["image_id"]: row["cider"] for row in table} == expected.per_image["CIDEr"]
    assert {row["image_id"]: row["length"] for row in table} == {"10": 6, "9": 5, "b": 4, "empty": 0}
    # The exported results get the same scores.
    from_results = evaluate(tmp_path / "results.json", "-m", manifest)
    assert from_results.output.splitlines()[1:] == result.output.splitlines()[1:]


def test_result_struct_needs_no_manifest(tmp_path: Path) -> None:
    predictions = [Prediction(i, text, references=tuple(REFERENCES[i])) for i, text in CAPTIONS.items()]
    (tmp_path / "result_struct.json").write_text(json.dumps(to_result_struct(predictions, {})))
    result = evaluate(tmp_path / "result_struct.json", "--bootstrap-samples", "0")
    expected = scores().overall["CIDEr"]
    assert f"  CIDEr                {expected:.4f}\n" in result.output


def test_missing_java_is_noted(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    result = evaluate(tmp_path / "captions", "-m", manifest)
    assert "`java` is not on the PATH: METEOR is omitted" in result.stderr
    assert "mean_length" in result.stdout
    assert "METEOR" not in result.stdout


def test_split_without_captions_is_rejected(tmp_path: Path, manifest: Path) -> None:
    with pytest.raises(DatasetError, match="its splits are val"):
        evaluate(tmp_path / "captions", "-m", manifest, "--split", "test")
