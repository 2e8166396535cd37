"""Reads a dataset that has every file which captionlib writes with other libraries, which skip different names."""

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pa_dataset
import pyarrow.parquet as pq
import pytest

from captionlib.data.shards.dataset import create_dataset, open_dataset
from captionlib.data.shards.removal import plan_removal
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.errors import FetchError


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    """Four images in two shards with failures, after one image was removed. The folder also has temporary files."""
    folder = tmp_path / "manifest"
    dataset = create_dataset(folder, "manifest", MANIFEST_SCHEMA, config={}, shards=2)
    for shard, names in enumerate((["a", "b", "gone"], ["c", "d"])):
        rows = [{"image_id": name, "uri": name, "split": "val", "captions": [f"a {name}"]} for name in names]
        with write_shard(dataset, shard, len(rows) + 1) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, MANIFEST_SCHEMA))
            writer.write_failure({"image_id": f"failed {shard}", "uri": ""}, FetchError("NotFound", "not found"))
    dataset.finish()
    plan_removal(open_dataset(folder), {"gone"}, "").run()
    with dataset.folder.stage("part-00002.parquet") as path:  # a run that is writing a shard
        pq.write_table(pa.table({"other": [1]}), path)
        temporary = path.relative_to(folder)
        content = path.read_bytes()
    for name in (temporary, Path("__update/id/part-00000.parquet"), Path("__sample/part-00000.parquet")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "part-00002.parquet").unlink()
    return str(folder)


def test_names_of_other_files_begin_with_underscores(manifest: str) -> None:
    # PyArrow, pandas and Spark skip `_`. `datasets` skips only folders that begin with `__`, wherever they are.
    paths = [path for path in Path(manifest).rglob("*") if path.is_file()]
    data = [path for path in paths if path.parent == Path(manifest) and not path.name.startswith("_")]
    assert sorted(path.name for path in data) == ["part-00000.parquet", "part-00001.parquet"]
    for path in set(paths) - set(data):
        top = path.relative_to(manifest).parts[0]
        assert top.startswith("_")
        assert path.suffix != ".parquet" or top.startswith("__")


def test_pyarrow_reads_the_folder(manifest: str) -> None:
    for table in (pq.read_table(manifest), pa_dataset.dataset(manifest).to_table()):
        assert table.schema.equals(MANIFEST_SCHEMA)
        assert sorted(table["image_id"].to_pylist()) == ["a", "b", "c", "d"]


def test_polars_reads_the_folder(manifest: str) -> None:
    polars = pytest.importorskip("polars")
    for rows in (polars.read_parquet(manifest, use_pyarrow=True), polars.read_parquet(f"{manifest}/*.parquet")):
        assert sorted(rows["image_id"]) == ["a", "b", "c", "d"]


def test_datasets_of_hugging_face_reads_the_folder(manifest: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(manifest, split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(rows["image_id"]) == ["a", "b", "c", "d"]
