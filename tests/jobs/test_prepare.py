from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from captionlib.errors import DuplicateIdError
from jobs.cli import captionlib
from tests.data.sources.helpers import touch


def prepare(*arguments: object) -> Result:
    return CliRunner().invoke(captionlib, ["prepare", *map(str, arguments)], catch_exceptions=False)


def test_prepare_prints_a_summary(tmp_path: Path) -> None:
    touch(tmp_path / "images", ["a.jpg", "b/c.png", "notes.txt"])
    result = prepare(tmp_path / "images", "-o", tmp_path / "manifest", "--default-split", "test")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == f"{tmp_path}/manifest: prepared, source format folder"
    counts = ["images 2", "captions 0", "shards 1", "split test 2", "skipped: not an image: extension .txt 1"]
    assert lines[1:] == counts
    again = prepare(tmp_path / "images", "-o", tmp_path / "manifest", "--default-split", "test")
    assert again.stdout.splitlines()[0].endswith("already prepared, nothing to do")


def test_prepare_rejects_a_split_file_without_a_split(tmp_path: Path) -> None:
    touch(tmp_path, ["a.jpg"])
    result = prepare(tmp_path, "-o", tmp_path / "manifest", "--split-file", "train.txt")
    assert result.exit_code == 2
    assert "expected SPLIT=FILE, such as train=train.txt, got 'train.txt'" in result.output


def test_prepare_raises_library_errors(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,url\n1,a.jpg\n2,b.jpg\n1,c.jpg\n")
    with pytest.raises(DuplicateIdError, match="expected one row per image id, got 2 with '1'"):
        prepare(tmp_path / "a.csv", "-o", tmp_path / "manifest", "--no-check-images")
