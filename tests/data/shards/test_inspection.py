from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pytest

from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.inspection import FailureExample, FailureReport, inspect_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DatasetError, DecodeError, FetchError


def write(folder: object, shards: int = 3, done: int = 2) -> ShardedDataset:
    """Writes shards with one row and as many failures as the number of the shard."""
    dataset = create_dataset(
        str(folder), "manifest", MANIFEST_SCHEMA, config={"source": {"kind": "folder"}}, shards=shards
    )
    for shard in range(done):
        with write_shard(dataset, shard, 1 + shard) as writer:
            row = {"image_id": f"i{shard}", "uri": "x", "split": "train", "captions": []}
            writer.write(pa.RecordBatch.from_pylist([row], schema=MANIFEST_SCHEMA))
            for number in range(shard):
                error = DecodeError("Truncated", "ends early") if number == 0 else FetchError("NotFound", "not found")
                writer.write_failure({"image_id": f"bad{shard}{number}", "uri": f"bad{shard}{number}.jpg"}, error)
    return dataset


def example(name: str, message: str) -> FailureExample:
    return FailureExample(name, f"{name}.jpg", message)


@pytest.mark.parametrize("place", ["local", "memory"])
def test_inspect_reports_progress(tmp_path: Path, place: str) -> None:
    address = str(tmp_path / "data") if place == "local" else f"memory://{uuid4().hex}"
    dataset = write(address)
    report = inspect_dataset(address)
    assert (report.kind, report.complete, report.shards_done, report.shards, report.rows) == (
        "manifest",
        False,
        2,
        3,
        2,
    )
    assert report.columns == {
        "image_id": "string",
        "uri": "string",
        "version": "string",
        "split": "string",
        "captions": "list<item: string>",
    }
    assert report.config == {"source": {"kind": "folder"}}
    assert report.fingerprint == dataset.fingerprint
    assert report.size == sum(dataset.folder.fs.size(dataset.get_part_path(shard)) for shard in (0, 1))
    assert report.problems == []


def test_inspect_reports_failures_by_reason_with_examples(tmp_path: Path) -> None:
    dataset = write(tmp_path, done=3)
    dataset.finish()
    report = inspect_dataset(tmp_path)
    assert report.complete
    assert report.failed == 3
    assert report.failures == {
        "Truncated": FailureReport(2, [example("bad10", "ends early"), example("bad20", "ends early")]),
        "NotFound": FailureReport(1, [example("bad21", "not found")]),
    }
    assert list(report.failures) == ["Truncated", "NotFound"]


def test_inspect_counts_failures_without_their_file(tmp_path: Path) -> None:
    write(tmp_path, done=2)
    (tmp_path / "__failures" / "part-00001.parquet").unlink()
    assert inspect_dataset(tmp_path).failures == {"Truncated": FailureReport(1, [])}


def test_inspect_verify_reports_changed_files(tmp_path: Path) -> None:
    write(tmp_path)
    with (tmp_path / "part-00001.parquet").open("r+b") as file:
        file.seek(8)
        file.write(b"x")
    assert inspect_dataset(tmp_path).problems == []
    (problem,) = inspect_dataset(tmp_path, verify=True).problems
    assert problem.startswith("part-00001.parquet: expected sha256:")


def test_inspect_reports_success_without_all_markers(tmp_path: Path) -> None:
    write(tmp_path, done=3).finish()
    assert inspect_dataset(tmp_path).problems == []
    (tmp_path / "__shards" / "part-00002.json").unlink()
    (problem,) = inspect_dataset(tmp_path).problems
    assert problem.startswith("_SUCCESS says that all 3 shards are finished, but only 2 have a valid marker file")


def test_inspect_counts_temporary_files(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "__temporary" / "part-00002.parquet.abc").write_bytes(b"half")
    assert inspect_dataset(tmp_path).temporary_files == 1


def test_inspect_rejects_other_folders(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a captionlib dataset"):
        inspect_dataset(tmp_path)


def test_inspect_counts_shards_whose_input_changed(tmp_path: Path) -> None:
    source = write(tmp_path / "manifest", done=2, shards=2)
    output = create_dataset(tmp_path / "output", "manifest", MANIFEST_SCHEMA, config={}, source=source)
    for shard, marker in source.read_markers().items():
        with write_shard(output, shard, 0, marker.checksum):
            pass
    assert inspect_dataset(output.folder.uri).stale == 0
    with write_shard(source, 1, 0):
        pass
    assert inspect_dataset(output.folder.uri).stale == 1
    create_dataset(tmp_path / "manifest", "manifest", MANIFEST_SCHEMA, config=source.config, shards=3)
    with write_shard(open_dataset(tmp_path / "manifest"), 2, 0):
        pass
    assert inspect_dataset(output.folder.uri).stale == 2
    (tmp_path / "manifest" / "_dataset.json").unlink()
    assert inspect_dataset(output.folder.uri).stale is None
    assert inspect_dataset(tmp_path / "output").source == str(tmp_path / "manifest")
