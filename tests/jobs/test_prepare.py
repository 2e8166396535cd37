from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from captionlib.errors import DatasetError, DuplicateIdError
from jobs.cli import captionlib
from tests.data.sources.source_files import write_empty_files
from tests.data.sources.test_containers import write_tar


def prepare(*arguments: object) -> Result:
    return CliRunner().invoke(captionlib, ["prepare", *map(str, arguments)], catch_exceptions=False)


def test_prepare_prints_a_summary(tmp_path: Path) -> None:
    write_empty_files(tmp_path / "images", ["a.jpg", "b/c.png", "notes.txt"])
    result = prepare(tmp_path / "images", "-o", tmp_path / "manifest", "--default-split", "test")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == f"{tmp_path}/manifest: prepared from format folder"
    counts = ["images 2", "captions 0", "shards 1", "split test 2", "skipped: not an image: extension .txt 1"]
    assert lines[1:] == counts
    again = prepare(tmp_path / "images", "-o", tmp_path / "manifest", "--default-split", "test")
    assert again.stdout.splitlines()[0] == "0 new, 0 changed, 0 missing, 2 unchanged images"
    assert again.stdout.splitlines()[1].endswith("already prepared, nothing to do")


def test_prepare_rejects_a_split_file_without_a_split(tmp_path: Path) -> None:
    write_empty_files(tmp_path, ["a.jpg"])
    result = prepare(tmp_path, "-o", tmp_path / "manifest", "--split-file", "train.txt")
    assert result.exit_code == 2
    assert "expected SPLIT=FILE, such as train=train.txt, got 'train.txt'" in result.output


def test_prepare_raises_library_errors(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,url\n1,a.jpg\n2,b.jpg\n1,c.jpg\n")
    with pytest.raises(DuplicateIdError, match="expected one row per image id, got 2 with '1'"):
        prepare(tmp_path / "a.csv", "-o", tmp_path / "manifest", "--no-check-images")


def test_prepare_shows_what_it_skips_and_where(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.txt", b"caf\xe9"), ("2.jpg", b"x"), ("2.txt", b"fine")])
    result = prepare(path, "-o", tmp_path / "manifest", "--no-progress")
    assert "skipped: caption is not UTF-8" in result.stdout
    assert f"Skipped: caption is not UTF-8, for example {path}, 1" in result.stderr
    with pytest.raises(DatasetError, match="caption is not UTF-8; correct it, or omit --strict"):
        prepare(path, "-o", tmp_path / "strict", "--strict")


def test_prepare_takes_names_of_columns(tmp_path: Path) -> None:
    write_empty_files(tmp_path, ["a.jpg"])
    (tmp_path / "pairs.csv").write_text("a.jpg,a dog\n")
    result = prepare(tmp_path / "pairs.csv", "-o", tmp_path / "manifest", "--columns", "image, caption")
    assert "captions 1" in " ".join(result.stdout.split())
