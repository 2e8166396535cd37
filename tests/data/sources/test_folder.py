import os
from pathlib import Path

import pytest

from captionlib.data.sources.formats import detect_format
from captionlib.errors import DatasetError
from tests.data.sources.helpers import read, touch


def test_a_folder_is_read_in_order_and_ids_are_paths_below_it(tmp_path: Path) -> None:
    touch(tmp_path, ["b.png", "a.JPG", "deep/er/c.webp", "deep/a.gif", "noextension"])
    rows, skipped = read(tmp_path, default_split="test")
    assert [row.image_id for row in rows] == ["a.JPG", "b.png", "noextension", "deep/a.gif", "deep/er/c.webp"]
    assert rows[3].uri == f"{tmp_path}/deep/a.gif"
    assert {row.split for row in rows} == {"test"}
    assert not skipped


def test_what_is_no_image_is_skipped_with_its_reason(tmp_path: Path) -> None:
    touch(tmp_path, ["a.jpg", "readme.txt", ".hidden.jpg", ".git/b.jpg", "part.00001"])
    os.mkfifo(tmp_path / "pipe.jpg")
    rows, skipped = read(tmp_path)
    assert [row.image_id for row in rows] == ["a.jpg"]
    assert skipped == {
        "no image: extension .txt": 1,
        "no image: extension of another kind": 1,
        "hidden": 2,
        "no regular file": 1,
    }


def test_links_are_followed_but_never_round_in_a_circle(tmp_path: Path) -> None:
    touch(tmp_path, ["photos/a.jpg", "elsewhere/b.jpg"])
    (tmp_path / "photos/loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/other").symlink_to(tmp_path / "elsewhere")
    rows, skipped = read(tmp_path / "photos")
    assert [row.image_id for row in rows] == ["a.jpg", "other/b.jpg"]
    assert skipped == {"link to a folder above it": 1}


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
def test_globs_and_braces(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    touch(tmp_path, ["a.jpg", "a.png", "x/b.jpg", "x/y/c.jpg", "z/d.jpg"])
    rows, _ = read(f"{tmp_path}/{pattern}")
    assert [row.image_id for row in rows] == expected


def test_a_name_with_brackets_is_no_glob(tmp_path: Path) -> None:
    touch(tmp_path, ["a [1].jpg", "a 1.jpg"])
    rows, _ = read(tmp_path / "a [1].jpg")
    assert [row.image_id for row in rows] == ["a [1].jpg"]


def test_a_name_that_is_no_utf8_is_skipped(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).touch()
    touch(tmp_path, ["a.jpg"])
    rows, skipped = read(tmp_path)
    assert [row.image_id for row in rows] == ["a.jpg"]
    assert skipped == {"name is not UTF-8": 1}


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere does not exist; expected a file, a folder or a glob"):
        detect_format(tmp_path / "nowhere")


def test_an_object_store_is_walked_like_a_disk() -> None:
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
