from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.errors import FetchError
from clusters.comparison import compare_datasets


def write(folder: Path, shards: Sequence[Sequence[str]], uri: str = "u", failed: str = "failed") -> Path:
    dataset = create_dataset(folder, "manifest", MANIFEST_SCHEMA, config={}, shards=len(shards))
    for number, names in enumerate(shards):
        rows = [{"image_id": name, "uri": uri, "split": "", "captions": []} for name in names]
        with write_shard(dataset, number, len(rows) + 1) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))
            writer.write_failure({"image_id": f"{failed}{number}", "uri": "u"}, FetchError("NotFound", "not found"))
    dataset.finish()
    return folder


@pytest.fixture
def expected(tmp_path: Path) -> Path:
    return write(tmp_path / "expected", [["a", "b"], ["c"]])


def test_equal_datasets_have_no_differences(expected: Path, tmp_path: Path) -> None:
    assert compare_datasets(expected, write(tmp_path / "same", [["a", "b"], ["c"]])) == []


@pytest.mark.parametrize(
    ("shards", "settings", "phrase"),
    [
        ([["a", "b"], ["c"]], {"uri": "elsewhere"}, "part-00000: rows differ"),
        ([["b", "a"], ["c"]], {}, "part-00000: rows differ"),
        ([["a"], ["c"]], {}, "part-00000: rows differ"),
        ([["a", "b"], ["a"]], {}, "image a occurs 2 times"),
        ([["a", "b"], ["c"]], {"failed": "lost"}, "part-00001: failures differ"),
    ],
)
def test_each_difference_is_reported(
    shards: list[list[str]], settings: dict[str, str], phrase: str, expected: Path, tmp_path: Path
) -> None:
    assert phrase in compare_datasets(expected, write(tmp_path / "other", shards, **settings))


def test_unexpected_files_and_missing_markers_are_reported(expected: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", [["a", "b"], ["c"]])
    (other / "part-00002.parquet").write_bytes(b"partial")
    assert compare_datasets(expected, other) == ["part-00002.parquet: unexpected file"]
    (other / "_SUCCESS").unlink()
    (difference,) = compare_datasets(expected, other)
    assert "is not complete" in difference
