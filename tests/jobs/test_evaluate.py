import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from captionlib.errors import DatasetError
from captionlib.evaluation.captions import score_captions
from jobs.cli import captionlib
from tests.evaluation.test_captions import CAPTIONS, REFERENCES, write_captions, write_manifest


def test_scores_are_printed_and_written(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    write_manifest(tmp_path / "manifest", REFERENCES)
    arguments = ["evaluate", str(tmp_path / "captions"), "-m", str(tmp_path / "manifest"), "--split", "val"]
    result = CliRunner().invoke(captionlib, [*arguments, "-o", str(tmp_path / "scores")], catch_exceptions=False)
    expected = score_captions(CAPTIONS, REFERENCES)
    assert result.output.splitlines()[0] == f"{tmp_path}/captions: 4 images"
    assert f"  BLEU-1   {expected.scores['BLEU-1']:.4f}" in result.output.splitlines()
    written = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert written == {"images": 4, "splits": ["val"], "scores": expected.scores}


def test_a_split_without_captions_is_an_error(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    write_manifest(tmp_path / "manifest", REFERENCES)
    arguments = ["evaluate", str(tmp_path / "captions"), "-m", str(tmp_path / "manifest"), "--split", "test"]
    with pytest.raises(DatasetError, match="its splits are val"):
        CliRunner().invoke(captionlib, arguments, catch_exceptions=False)
