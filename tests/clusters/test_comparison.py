from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.errors import FetchError
from clusters.comparison import compare_datasets


def write(folder: Path, shards: Sequence[Sequence[str]], uri: str = "u", failed: str = "gone") -> Path:
    dataset = create_dataset(folder, "manifest", MANIFEST_SCHEMA, config={}, shards=len(shards))
    for number, names in enumerate(shards):
        rows = [{"image_id": name, "uri": uri, "split": "", "captions": []} for name in names]
        with write_shard(dataset, number, len(rows) + 1) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))
            writer.write_failure(f"{failed}{number}", "u", FetchError("gone", "gone"))
    dataset.finish()
    return folder


@pytest.fixture
def expected(tmp_path: Path) -> Path:
    return write(tmp_path / "expected", [["a", "b"], ["c"]])


def test_equal_datasets_do_not_differ(expected: Path, tmp_path: Path) -> None:
    assert compare_datasets(expected, write(tmp_path / "same", [["a", "b"], ["c"]])) == []


@pytest.mark.parametrize(
    ("shards", "settings", "phrase"),
    [
        ([["a", "b"], ["c"]], {"uri": "elsewhere"}, "part-00000: other rows"),
        ([["b", "a"], ["c"]], {}, "part-00000: other rows"),
        ([["a"], ["c"]], {}, "part-00000: other rows"),
        ([["a", "b"], ["a"]], {}, "image a is there 2 times"),
        ([["a", "b"], ["c"]], {"failed": "lost"}, "part-00001: other failures"),
    ],
)
def test_each_difference_is_told(
    shards: list[list[str]], settings: dict[str, str], phrase: str, expected: Path, tmp_path: Path
) -> None:
    assert phrase in compare_datasets(expected, write(tmp_path / "other", shards, **settings))


def test_files_too_many_and_missing_marks_are_told(expected: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", [["a", "b"], ["c"]])
    (other / "part-00002.parquet").write_bytes(b"half")
    assert compare_datasets(expected, other) == ["part-00002.parquet: a file too many"]
    (other / "_SUCCESS").unlink()
    (told,) = compare_datasets(expected, other)
    assert "is not complete" in told
