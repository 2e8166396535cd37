"""Layouts in which collections of images and captions are commonly published."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captionlib.errors import ConfigError, DatasetError
from tests.data.sources.source_files import read
from tests.data.sources.test_containers import fetch_images, write_tar


def read_captions(path: Path, **options: Any) -> list[tuple[str, tuple[str, ...]]]:
    return [(row.image_id, row.captions) for row in read(path, **options)[0]]


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.csv", 'a.jpg,"a dog, a cat"\nb.jpg,two; three | four\n', ("image", "caption")),
        ("a.tsv", "a dog, a cat\ta.jpg\ntwo; three | four\tb.jpg\n", ("caption", "image")),
        ("a.txt", "a.jpg|a dog, a cat\nb.jpg|two; three | four\n", ("image", "caption")),
        ("a.txt", "a.jpg\ta dog, a cat\nb.jpg\ttwo; three | four\n", ("image", "caption")),
    ],
)
def test_table_without_header(tmp_path: Path, name: str, content: str, columns: tuple[str, ...]) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match="if the table has no header, specify all columns with --columns"):
        read(tmp_path / name)
    expected = [("a.jpg", ("a dog, a cat",)), ("b.jpg", ("two; three | four",))]
    assert read_captions(tmp_path / name, columns=columns) == expected


def test_columns_are_refused_for_other_tables(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"url": "a.jpg"}\n')
    with pytest.raises(ConfigError, match="--columns is for CSV and TSV without a header"):
        read(tmp_path / "a.jsonl", columns=("url",))


@pytest.mark.parametrize("header", ["image,caption", "image_name, comment", "image|caption"])
def test_text_file_with_unquoted_delimiters_in_captions(tmp_path: Path, header: str) -> None:
    delimiter = "|" if "|" in header else ","
    lines = [
        header,
        'a.jpg,"A dog, a cat ."',
        "a.jpg,One, two, and three .",
        'b.jpg,"""Stop"" , it says ."',
        'b.jpg,"A" B',
    ]
    (tmp_path / "captions.txt").write_text("\n".join(line.replace(".jpg,", f".jpg{delimiter}") for line in lines))
    assert read_captions(tmp_path / "captions.txt") == [
        ("a.jpg", ("A dog, a cat .", "One, two, and three .")),
        ("b.jpg", ('"Stop" , it says .', '"A" B')),
    ]


def test_flickr30k_results_file(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\na.jpg| 0| Two, men .\na.jpg| 1| A man .\n"
    )
    assert read_captions(tmp_path / "results.csv") == [("a.jpg", ("Two, men .", "A man ."))]


def test_text_file_line_without_a_caption_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg\n")
    with pytest.raises(DatasetError, match="line 2: expected 2 cells, got 1"):
        read(tmp_path / "captions.txt")


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_of_records(tmp_path: Path, indent: int | None) -> None:
    records = [{"id": 1.0, "url": "a.jpg", "captions": ["one", "two"]}, {"id": 2, "url": "b.jpg"}]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=indent))
    assert read_captions(tmp_path / "a.json") == [("1", ("one", "two")), ("2", ())]
    (tmp_path / "a.json").write_text(json.dumps([*records, {"id": 3}], indent=indent))
    assert read(tmp_path / "a.json")[1] == {"object without an image uri, or with ambiguous keys": 1}
    (tmp_path / "a.json").write_text(json.dumps([{"id": 3}, {"id": 4}], indent=indent))
    with pytest.raises(ConfigError, match=r"a\.json, \[0\]: no column for the image uris"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["image", "jpg", "png", "img", "bytes"])
@pytest.mark.parametrize("data_type", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_parquet_with_a_binary_image_column(tmp_path: Path, name: str, data_type: pa.DataType) -> None:
    images = pa.array([b"first", b"second image, too long to be inlined"], data_type)
    pq.write_table(pa.table({"id": ["1", "2"], name: images, "caption": ["x", "y"]}), tmp_path / "a.parquet")
    rows, _ = read(tmp_path / "a.parquet")
    assert [(row.image_id, row.captions) for row in rows] == [("1", ("x",)), ("2", ("y",))]
    assert fetch_images(rows) == images.to_pylist()


def test_parquet_with_binary_views_in_a_struct(tmp_path: Path) -> None:
    image_type = pa.struct([("bytes", pa.binary_view()), ("path", pa.string())])
    images = pa.array([{"bytes": b"one", "path": "1.jpg"}, {"bytes": b"two", "path": None}], image_type)
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    rows, _ = read(tmp_path / "a.parquet")
    assert [row.image_id for row in rows] == ["1.jpg", "a.parquet#1"]
    assert fetch_images(rows) == [b"one", b"two"]


def make_images(*contents: bytes, path: str | None = None) -> list[dict[str, Any]]:
    return [{"bytes": content, "path": path} for content in contents]


def test_parquet_with_several_image_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"mask": make_images(b"m"), "image": make_images(b"i")}), path)
    assert fetch_images(read(path)[0]) == [b"i"]
    assert fetch_images(read(path, image_column="mask")[0]) == [b"m"]
    pq.write_table(pa.table({"mask": make_images(b"m"), "photo": make_images(b"p")}), path)
    with pytest.raises(ConfigError, match="one column of images, got mask, photo; select one with --image-column"):
        read(path)
    with pytest.raises(ConfigError, match="expected column 'caption' of type"):
        read(path, image_column="caption")


@pytest.mark.parametrize(
    "options", [{"caption_columns": ("image",)}, {"split_column": "image"}, {"id_column": "image"}]
)
def test_parquet_images_are_not_captions_splits_or_ids(tmp_path: Path, options: dict[str, Any]) -> None:
    pq.write_table(pa.table({"image": [b"image"]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match=r"expected image as text.*, got bytes b'image'"):
        read(tmp_path / "a.parquet", **options)


def test_parquet_paths_that_repeat_are_not_ids(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": make_images(b"1", b"2", path="image.jpg")}), tmp_path / "a.parquet")
    assert [row.image_id for row in read(tmp_path / "a.parquet")[0]] == ["a.parquet#0", "a.parquet#1"]


@pytest.mark.parametrize("extension", ["txt", "caption", "text", "captions", "caption.txt"])
def test_tar_captions_of_every_extension(tmp_path: Path, extension: str) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), (f"1.{extension}", b"a dog\ntwo")])
    assert read_captions(path) == [("1", ("a dog", "two"))]


def test_tar_names_with_dots(tmp_path: Path) -> None:
    members = [("d/22.05.png", b"1"), ("d/22.05.txt", b"first"), ("d/22.06.png", b"2"), ("d/22.06.txt", b"second")]
    rows, skipped = read(write_tar(tmp_path / "a.tar", members))
    assert [(row.image_id, row.captions) for row in rows] == [("d/22.05", ("first",)), ("d/22.06", ("second",))]
    assert fetch_images(rows) == [b"1", b"2"]
    assert not skipped
    rows, skipped = read(write_tar(tmp_path / "b.tar", [("7.rgb.jpg", b"1"), ("7.mask.png", b"2"), ("7.json", b'"x"')]))
    assert [(row.image_id, row.captions) for row in rows] == [("7", ("x",))]
    assert skipped == {"additional image in a sample": 1}


def test_uris_may_have_surrounding_blanks_and_any_case(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url\n  http://x.org/a.jpg \nHTTPS://x.org/b.jpg\n c.jpg\n")
    uris = [row.uri for row in read(tmp_path / "a.csv")[0]]
    assert uris == ["http://x.org/a.jpg", "HTTPS://x.org/b.jpg", f"{tmp_path}/c.jpg"]


def test_data_uris_are_not_paths(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('url\n"data:image/png;base64,AAAA"\n')
    assert [row.uri for row in read(tmp_path / "a.csv")[0]] == ["data:image/png;base64,AAAA"]


@pytest.mark.parametrize("name", ["x#row=1&column=y", "x#bytes=0-5", "a b#bytes=0-5", "100%25.jpg"])
def test_file_whose_name_looks_like_an_address(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"an image")
    rows, _ = read(tmp_path)
    assert [row.image_id for row in rows] == [name]
    assert fetch_images(rows) == [b"an image"]
    (tmp_path / "table.csv").write_text(f"url\n{name}\n")
    assert fetch_images(read(tmp_path / "table.csv")[0]) == [b"an image"]


def test_remote_file_whose_name_looks_like_an_address_is_skipped() -> None:
    fsspec.filesystem("memory").pipe({"/looks/x#bytes=0-5.jpg": b"y", "/looks/x#row=1&column=y.jpg": b"x"})
    rows, skipped = read("memory://looks")
    assert [row.image_id for row in rows] == ["x#bytes=0-5.jpg"]
    assert skipped == {"name that looks like the address of a part of a file": 1}
