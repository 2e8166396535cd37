"""Tars and Parquet with embedded images: each uri must fetch exactly the bytes that were stored."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captionlib.data.images.fetching import FetchConfig, ImageFetcher
from captionlib.data.sources.rows import ImageRecord
from captionlib.errors import DatasetError
from tests.data.sources.source_files import read


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def fetch_images(rows: list[ImageRecord]) -> list[bytes]:
    fetcher = ImageFetcher(FetchConfig())
    return [bytes(fetcher.fetch(row.uri)) for row in rows]


SAMPLES = [
    ("s/000.jpg", b"first image"),
    ("s/000.txt", b"a dog\ntwo dogs\n"),
    ("s/000.json", json.dumps({"caption": "not this one", "key": "K0"}).encode()),
    ("s/001.mask.png", b"mask"),
    ("s/001.png", b"second image"),
    ("s/001.json", json.dumps({"caption": "a cat", "key": "K1"}).encode()),
    ("s/002.txt", b"no image"),
]


def test_webdataset_yields_byte_ranges_and_captions_per_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00000.tar", SAMPLES)
    rows, skipped = read(path, default_split="train")
    assert [(row.image_id, row.split, row.captions) for row in rows] == [
        ("s/000", "train", ("a dog", "two dogs")),
        ("s/001", "train", ("a cat",)),
    ]
    assert fetch_images(rows) == [b"first image", b"second image"]
    assert skipped == {"additional image in a sample": 1, "sample without an image": 1}


def test_webdataset_takes_id_and_captions_from_json_on_request(tmp_path: Path) -> None:
    rows, _ = read(write_tar(tmp_path / "a.tar", SAMPLES), id_column="key", caption_columns=("caption",))
    assert [(row.image_id, row.captions) for row in rows] == [("K0", ("not this one",)), ("K1", ("a cat",))]


def test_webdataset_expands_brace_ranges(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number:05d}.tar", [(f"{number}.jpg", b"image %d" % number)])
    rows, _ = read(f"{tmp_path}/{{00000..00002}}.tar")
    assert [row.image_id for row in rows] == ["0", "1", "2"]
    assert fetch_images(rows) == [b"image 0", b"image 1", b"image 2"]


def test_tar_extensions_are_recognized_in_any_case(tmp_path: Path) -> None:
    write_tar(tmp_path / "A.TAR", [("1.jpg", b"image")])
    for source in (tmp_path, tmp_path / "A.TAR", f"{tmp_path}/*.TAR"):
        assert [row.image_id for row in read(source)[0]] == ["1"]


def test_webdataset_rejects_truncated_and_compressed_tars(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{number}.jpg", bytes(3000)) for number in range(9)])
    whole = path.read_bytes()
    path.write_bytes(whole[:15_000])
    with pytest.raises(DatasetError, match=r"a\.tar is (truncated or damaged|not a tar, or is damaged)"):
        read(path)
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(DatasetError, match=r"is compressed with gzip, .*; convert it to an uncompressed tar"):
        read(path)


def write_rows(path: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def test_hf_parquet_yields_uris_of_the_embedded_images(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": b"image %d" % number, "path": f"{number}.jpg"}, "caption": [f"dog {number}", "dog"]}
        for number in range(5)
    ]
    yielded, _ = read(write_rows(tmp_path / "train.parquet", rows), default_split="train")
    assert [(row.image_id, row.split, row.captions) for row in yielded] == [
        (f"{number}.jpg", "train", (f"dog {number}", "dog")) for number in range(5)
    ]
    assert fetch_images(yielded) == [row["image"]["bytes"] for row in rows]


def test_hf_parquet_prefers_an_id_column_and_numbers_rows_without_a_path(tmp_path: Path) -> None:
    rows = [{"picture": {"bytes": b"x", "path": None}, "id": 7 + number} for number in range(2)]
    path = write_rows(tmp_path / "a.parquet", rows)
    assert [row.image_id for row in read(path)[0]] == ["7", "8"]
    pq.write_table(pq.read_table(path).select(["picture"]), path)
    assert [row.image_id for row in read(path)[0]] == ["a.parquet#0", "a.parquet#1"]
