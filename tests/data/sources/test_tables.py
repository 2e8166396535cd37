import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captionlib.data.sources.rows import ImageRecord
from captionlib.errors import ConfigError, DatasetError
from tests.data.sources.source_files import read

Values = list[tuple[str, str, str, tuple[str, ...]]]


def to_values(rows: list[ImageRecord]) -> Values:
    return [(row.image_id, row.uri, row.split, row.captions) for row in rows]


EXPECTED: Values = [
    ("1", "https://example.org/a.jpg", "train", ("a dog", "two, dogs")),
    ("2", "https://example.org/b.jpg", "val", ("a cat",)),
]


def write_table(folder: Path, kind: str) -> Path:
    path = folder / f"table{kind}"
    rows = [(row[0], row[1], row[2], caption) for row in EXPECTED for caption in row[3]]
    if kind in {".csv", ".tsv", ".csv.gz"}:
        separator = "\t" if kind == ".tsv" else ","
        lines = [["id", "url", "split", "caption"], *rows]
        text = "\n".join(separator.join(f'"{cell}"' if separator in cell else cell for cell in line) for line in lines)
        content = ("\ufeff" + text + "\n").encode()
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    elif kind == ".jsonl":
        records = [{"id": int(row[0]), "url": row[1], "split": row[2], "captions": list(row[3])} for row in EXPECTED]
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        names = ["image_id", "uri", "split", "captions"]
        columns = [[int(row[0]) for row in EXPECTED], *([row[at] for row in EXPECTED] for at in (1, 2, 3))]
        pq.write_table(pa.table(dict(zip(names, columns, strict=True))), path)
    return path


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".csv.gz", ".jsonl", ".parquet"])
def test_every_table_format_yields_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows, skipped = read(write_table(tmp_path, kind))
    assert to_values(rows) == EXPECTED
    assert not skipped


def test_options_name_unconventional_columns(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("nr,where,alt,more,part\n7,x/a.jpg,one,two,dev\n")
    with pytest.raises(ConfigError, match=r"no column for the image uris; .* got the columns nr, where, alt"):
        read(path)
    names = {"id_column": "nr", "uri_column": "where", "caption_columns": ("alt", "more"), "split_column": "part"}
    assert to_values(read(path, **names)[0]) == [("7", f"{tmp_path}/x/a.jpg", "dev", ("one", "two"))]
    with pytest.raises(ConfigError, match=r"column 'alternative' not found; the table has the columns nr"):
        read(path, uri_column="where", caption_columns=("alternative",))


def test_uri_is_the_id_without_an_id_column(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("path\na.jpg\nb.jpg\n")
    assert [(row.image_id, row.uri) for row in read(path)[0]] == [
        ("a.jpg", f"{tmp_path}/a.jpg"),
        ("b.jpg", f"{tmp_path}/b.jpg"),
    ]
    assert read(path, image_root="memory://images/all")[0][1].uri == "memory://images/all/b.jpg"


def test_rows_with_lists_of_captions_are_not_merged(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"id": 1, "url": "a.jpg", "captions": ["one"]}\n' * 2)
    assert [(row.image_id, row.captions) for row in read(path)[0]] == [("1", ("one",))] * 2


def test_existing_file_with_braces_is_not_expanded(tmp_path: Path) -> None:
    path = tmp_path / "{a,b}.csv"
    path.write_text("path\na.jpg\n")
    assert [row.image_id for row in read(path)[0]] == ["a.jpg"]


def test_captions_of_an_image_in_a_second_split_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("id,url,split,caption\n1,a.jpg,train,one\n1,a.jpg,val,two\n")
    rows, skipped = read(path)
    assert [(row.split, row.captions) for row in rows] == [("train", ("one",))]
    assert skipped == {"second split for the same image": 1}
    with pytest.raises(DatasetError, match=r"line 3: expected split 'train' for image 1, as in .*line 2, got 'val'"):
        read(path, strict=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "id,url\n1,a.jpg,surplus\n",
            r"line 2: expected 2 cells, got 3; quote cells that contain the delimiter",
        ),
        ("a.csv", 'id,url\n1,"a.jpg\n', r"line \d: .*; check the quotes"),
        ("a.csv", b"id,url\n1,\xff.jpg\n", r"not UTF-8"),
        ("a.jsonl", '{"url": "a.jpg"}\n{"url": \n', r"line 2, column \d+: not JSON: .*expected one object per line"),
        (
            "a.jsonl",
            '{"url": "a.jpg"}\n[1]\n',
            r"line 2: expected an object, got list \[1\]: entry that is not an object; correct it, or omit --strict",
        ),
        ("a.jsonl", '{"url": 1.5}\n', r"line 1: expected url as text, got number 1\.5"),
        (
            "a.jsonl",
            '{"url": "a", "caption": 3}\n',
            r"line 1: expected caption as text or a list of texts, got number 3",
        ),
        ("a.parquet", "PAR1 no more", r"is not Parquet, or is damaged"),
        ("a.csv.gz", b"\x1f\x8b\x08\x00broken", r"cannot be read"),
    ],
)
def test_damaged_table_is_an_error_naming_the_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DatasetError, match=message):
        read(path, strict=True)
