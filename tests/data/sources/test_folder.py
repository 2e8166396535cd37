import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from captionlib.data.sources.formats import detect_format
from captionlib.data.sources.locations import Location, scan_folder
from captionlib.errors import DatasetError
from tests.data.sources.source_files import read, write_empty_files


def test_folder_yields_sorted_relative_paths_as_ids(tmp_path: Path) -> None:
    write_empty_files(tmp_path, ["b.png", "a.JPG", "deep/er/c.webp", "deep/a.gif", "noextension"])
    rows, skipped = read(tmp_path, default_split="test")
    assert [row.image_id for row in rows] == ["a.JPG", "b.png", "noextension", "deep/a.gif", "deep/er/c.webp"]
    assert rows[3].uri == f"{tmp_path}/deep/a.gif"
    assert {row.split for row in rows} == {"test"}
    assert not skipped


def test_folder_skips_other_files_with_a_reason(tmp_path: Path) -> None:
    write_empty_files(tmp_path, ["a.jpg", "readme.txt", ".hidden.jpg", ".git/b.jpg", "part.00001"])
    os.mkfifo(tmp_path / "pipe.jpg")
    rows, skipped = read(tmp_path)
    assert [row.image_id for row in rows] == ["a.jpg"]
    assert skipped == {
        "not an image: extension .txt": 1,
        "not an image: other extension": 1,
        "hidden": 2,
        "not a regular file": 1,
    }


def test_folder_follows_links_except_to_a_parent(tmp_path: Path) -> None:
    write_empty_files(tmp_path, ["images/a.jpg", "elsewhere/b.jpg"])
    (tmp_path / "images/loop").symlink_to(tmp_path / "images")
    (tmp_path / "images/other").symlink_to(tmp_path / "elsewhere")
    rows, skipped = read(tmp_path / "images")
    assert [row.image_id for row in rows] == ["a.jpg", "other/b.jpg"]
    assert skipped == {"link to a parent folder": 1}


def test_files_and_folders_that_are_deleted_meanwhile_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_empty_files(tmp_path, ["a.jpg", "b.jpg", "x/c.jpg", "y/z/d.jpg"])

    def scan(location: Location) -> Iterator[tuple[str, str | None, Any]]:
        entries = sorted(scan_folder(location), key=lambda entry: entry[0])
        for name in ("b.jpg", "x/c.jpg", "y/z/d.jpg"):
            (tmp_path / name).unlink(missing_ok=True)
        for name in ("x", "y/z", "y"):
            if (tmp_path / name).exists() and location.path != f"{tmp_path}/y":
                (tmp_path / name).rmdir()
        yield from entries

    monkeypatch.setattr("captionlib.data.sources.folder.scan_folder", scan)
    rows, skipped = read(tmp_path)
    assert [row.image_id for row in rows] == ["a.jpg"]
    assert skipped == {"deleted while the folder was listed": 3}


@pytest.mark.parametrize("lost", ["root", "root/x"])
def test_disk_that_is_unmounted_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    root = tmp_path / "root"
    write_empty_files(root, ["a.jpg", "x/y/b.jpg"])

    def scan(location: Location) -> Iterator[tuple[str, str | None, Any]]:
        yield from scan_folder(location)
        if location.path == f"{root}/x":  # y was listed, but not yet read
            (tmp_path / lost).rename(tmp_path / "elsewhere")
            (tmp_path / lost).mkdir()

    monkeypatch.setattr("captionlib.data.sources.folder.scan_folder", scan)
    with pytest.raises(DatasetError, match="x/y cannot be read: No such file"):
        read(root)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg"]),
        ("**/*.jpg", ["a.jpg", "x/b.jpg", "x/y/c.jpg", "z/d.jpg"]),
        ("x/**", ["b.jpg", "y/c.jpg"]),
        ("[xz]/?.jpg", ["x/b.jpg", "z/d.jpg"]),
        ("{a,x/b}.jpg", ["a.jpg", "b.jpg"]),
    ],
)
def test_folder_matches_globs_and_braces(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    write_empty_files(tmp_path, ["a.jpg", "a.png", "x/b.jpg", "x/y/c.jpg", "z/d.jpg"])
    rows, _ = read(f"{tmp_path}/{pattern}")
    assert [row.image_id for row in rows] == expected


def test_existing_file_with_brackets_is_not_a_glob(tmp_path: Path) -> None:
    write_empty_files(tmp_path, ["a [1].jpg", "a 1.jpg"])
    rows, _ = read(tmp_path / "a [1].jpg")
    assert [row.image_id for row in rows] == ["a [1].jpg"]


def test_folder_skips_names_that_are_not_utf8(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).touch()
    write_empty_files(tmp_path, ["a.jpg"])
    rows, skipped = read(tmp_path)
    assert [row.image_id for row in rows] == ["a.jpg"]
    assert skipped == {"name is not UTF-8": 1}


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere does not exist; expected a file, a folder or a glob"):
        detect_format(tmp_path / "nowhere")


def test_folder_walks_an_object_store_like_a_disk() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("b.jpg", "a/c.jpg", "a/.hidden.jpg"):
        store.pipe(f"/walked/{name}", b"")
    rows, skipped = read("memory://walked")
    assert [(row.image_id, row.uri) for row in rows] == [
        ("b.jpg", "memory://walked/b.jpg"),
        ("a/c.jpg", "memory://walked/a/c.jpg"),
    ]
    assert skipped == {"hidden": 1}
