from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from captionlib.errors import DuplicateIdError
from jobs.cli import captionlib
from tests.data.sources.helpers import touch


def prepare(*arguments: object) -> Result:
    return CliRunner().invoke(captionlib, ["prepare", *map(str, arguments)], catch_exceptions=False)


def test_a_folder_is_prepared_and_summed_up(tmp_path: Path) -> None:
    touch(tmp_path / "photos", ["a.jpg", "b/c.png", "notes.txt"])
    result = prepare(tmp_path / "photos", "-o", tmp_path / "manifest", "--default-split", "test")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == f"{tmp_path}/manifest: prepared from folder"
    assert lines[1:] == ["images 2", "captions 0", "shards 1", "split test 2", "skipped: no image: extension .txt 1"]
    again = prepare(tmp_path / "photos", "-o", tmp_path / "manifest", "--default-split", "test")
    assert again.stdout.splitlines()[0].endswith("already prepared, nothing to do")


def test_split_files_are_pairs(tmp_path: Path) -> None:
    touch(tmp_path, ["a.jpg"])
    result = prepare(tmp_path, "-o", tmp_path / "manifest", "--split-file", "train.txt")
    assert result.exit_code == 2
    assert "expected SPLIT=FILE, such as train=train.txt, got 'train.txt'" in result.output


def test_errors_reach_the_user(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,url\n1,a.jpg\n2,b.jpg\n1,c.jpg\n")
    with pytest.raises(DuplicateIdError, match="image id '1' is there 2 times"):
        prepare(tmp_path / "a.csv", "-o", tmp_path / "manifest", "--no-check-images")
