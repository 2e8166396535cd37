"""Every reader, given a valid file in which one value is replaced by anything, reads it or raises a library error."""

import copy
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from captionlib.data.ingestion.staging import stage_rows
from captionlib.data.sources.formats import detect_format, read_source
from captionlib.data.sources.rows import SkipCounter, SourceOptions
from captionlib.errors import CaptionlibError

_RAW = {"<deep>": "[" * 1500 + "]" * 1500, "<long>": "9" * 5000}  # JSON that json.dumps cannot write

NULLS = {"None", "nan", "NaN", "null"}  # in JSON, these are text if they are written as text

TEXT = st.text(max_size=8).filter(lambda text: text.strip() not in NULLS)
VALUES = st.one_of(
    st.none(),
    st.sampled_from(
        [*_RAW, float("nan"), float("inf"), 1e300, True, "", " ", "\ud83d", "a\0b", "x" * 5000, "['a' 'b']"]
    ),
    st.integers(-(10**20), 10**20),
    st.floats(),
    TEXT,
    st.recursive(
        st.none() | st.integers() | TEXT,
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=4,
    ),
)

_SENTENCE = {"raw": "a dog", "tokens": ["a", "dog"], "sentid": 0}
_IMAGE = {"imgid": 0, "filename": "a.jpg", "filepath": "x", "split": "train", "sentences": [_SENTENCE], "cocoid": 7}
DOCUMENTS: dict[str, Any] = {
    "captions_train2014.json": {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}, {"id": 2, "image_id": 2, "caption": "a cat"}],
    },
    "dataset.json": {"images": [_IMAGE, {**_IMAGE, "imgid": 1, "cocoid": 8}], "dataset": "coco"},
    "records.json": [{"id": 1, "url": "a.jpg", "caption": "x", "split": "val"}, {"id": 2, "url": "b.jpg"}],
    "lines.jsonl": [{"id": 1, "url": "a.jpg", "captions": ["x", "y"]}, {"id": 2, "url": "b.jpg", "split": "val"}],
    "sample.tar": {"caption": ["x"], "key": 3},
}


def list_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from list_paths(child, (*path, key))


def replace_value(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.copy(document)
    changed[path[0]] = replace_value(document[path[0]], path[1:], value)
    return changed


def to_json(value: Any) -> str:
    text = json.dumps(value)
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text


def write(path: Path, document: Any) -> None:
    if path.suffix == ".tar":
        content = to_json(document).encode()
        with tarfile.open(path, "w") as tar:
            for name, data in (("1.jpg", b"image"), ("1.json", content), ("2.jpg", b"image"), ("2.txt", b"fine")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    elif path.suffix == ".jsonl" and isinstance(document, list):
        path.write_text("\n".join(map(to_json, document)))
    else:
        path.write_text(to_json(document))


def check(path: Path, **options: Any) -> None:
    """Reads a source. Raises any error that is not the library's; checks that no null became text."""
    try:
        rows = list(read_source(detect_format(path), [str(path)], SourceOptions(**options), SkipCounter()))
        stage_rows(rows, path.parent / "rows.parquet")
    except CaptionlibError as error:
        message = str(error)
        assert str(path) in message
        assert len(message) < 1000
        assert "\n" not in message
        return
    texts = {text for row in rows for text in (row.image_id, row.uri, row.split, *row.captions)}
    names = {text.rpartition("/")[2] for text in texts}
    assert not names & NULLS


@pytest.mark.parametrize("name", list(DOCUMENTS))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_json_with_one_value_replaced(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    document, folder = DOCUMENTS[name], tmp_path_factory.getbasetemp()
    path = data.draw(st.sampled_from(list(list_paths(document))))
    write(folder / name, replace_value(document, path, data.draw(VALUES)))
    check(folder / name, **({"id_column": "key"} if name == "sample.tar" and data.draw(st.booleans()) else {}))


CELLS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "nan",
            "None",
            "",
            '"',
            '""',
            '"a',
            "['a', 'b']",
            "[]",
            "1e5",
            "-1.0",
            "\0",
            "a\nb,c",
            "[" * 2000,
            "<huge>",
        ]
    ),
)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "captions.txt", "results.token"])
@settings(max_examples=100, deadline=None)
@given(cell=CELLS, row=st.integers(0, 2), column=st.integers(0, 1))
def test_text_table_with_one_cell_replaced(
    tmp_path_factory: pytest.TempPathFactory, name: str, cell: str, row: int, column: int
) -> None:
    cells = [["image", "caption"], ["a.jpg", "a dog"], ["b.jpg", "two, dogs" if name != "a.csv" else "two"]]
    if name == "results.token":
        cells = [["a.jpg#0", "x"], ["a.jpg#1", "y"], ["b.jpg#0", "z"]]
    cells[row][column] = cell.replace("<huge>", "x" * 200_000)
    delimiter = "," if name in {"a.csv", "captions.txt"} else "\t"
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes("\n".join(delimiter.join(line) for line in cells).encode(errors="surrogatepass"))
    check(path)


PARQUET_VALUES: list[tuple[pa.DataType, Any]] = [
    *((pa.null(), None), (pa.float64(), float("nan")), (pa.float16(), 1.0), (pa.bool_(), True), (pa.binary(), b"\xff")),
    *((pa.decimal128(5, 1), 1), (pa.date32(), 1), (pa.timestamp("ns", tz="UTC"), 2**63 - 1), (pa.duration("s"), 2**62)),
    *((pa.list_(pa.int8()), [1]), (pa.list_(pa.list_(pa.string())), [["x"]]), (pa.string(), "nan\0")),
    *((pa.struct([("a", pa.int8())]), {"a": 1}), (pa.struct([("raw", pa.string())]), {"raw": None})),
    *((pa.map_(pa.string(), pa.int8()), [("a", 1)]), (pa.list_(pa.map_(pa.string(), pa.string())), [[("a", "b")]])),
    *(
        (pa.dictionary(pa.int8(), pa.string()), "x"),
        (pa.struct([("bytes", pa.binary()), ("path", pa.int8())]), {"path": 1}),
    ),
]


@pytest.mark.parametrize(("data_type", "value"), PARQUET_VALUES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("column", ["id", "url", "caption", "split", "image"])
def test_parquet_with_one_column_replaced(tmp_path: Path, column: str, data_type: pa.DataType, value: Any) -> None:
    columns: dict[str, Any] = {
        "id": ["1", "2"],
        "url": ["a.jpg", "b.jpg"],
        "caption": ["x", "y"],
        "split": ["train", ""],
    }
    if value is not None and pa.types.is_timestamp(data_type):
        value = pa.scalar(value, pa.int64()).cast(data_type)
    columns[column] = pa.array([value, None], data_type)
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    check(tmp_path / "a.parquet")


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 3 * 512), replacement=st.binary(min_size=1, max_size=12))
def test_tar_with_damaged_bytes(tmp_path_factory: pytest.TempPathFactory, at: int, replacement: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    write(path, {"caption": "x"})
    content = bytearray(path.read_bytes())
    content[at : at + len(replacement)] = replacement
    path.write_bytes(content)
    check(path)
