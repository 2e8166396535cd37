from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest

from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.stages import ProcessRows, ReportFailure, ShardJob
from captionlib.data.shards.writer import write_shard
from captionlib.errors import FetchError, StorageError


@dataclass(frozen=True)
class Shout:
    """Converts uris to upper case. Images in `broken` fail, and `seen` records the processed ids."""

    broken: set[str] = field(default_factory=set)
    seen: list[str] = field(default_factory=list)
    columns: None = None

    @contextmanager
    def open(self) -> Iterator[ProcessRows]:
        def process(rows: Iterator[pa.RecordBatch], fail: ReportFailure) -> Iterator[tuple[pa.RecordBatch, ...]]:
            for batch in rows:
                kept = []
                for row in batch.to_pylist():
                    self.seen.append(row["image_id"])
                    if row["image_id"] in self.broken:
                        fail(row["image_id"], row["uri"], FetchError("Gone", "not there"))
                    else:
                        kept.append({**row, "uri": row["uri"].upper()})
                output = pa.RecordBatch.from_pylist(kept, schema=MANIFEST_SCHEMA)
                yield output, output

        yield process


@pytest.fixture
def source(tmp_path: Path) -> ShardedDataset:
    dataset = create_dataset(tmp_path / "source", "manifest", MANIFEST_SCHEMA, config={}, shards=2)
    for shard in range(2):
        with write_shard(dataset, shard, 5) as writer:
            rows = [
                {"image_id": f"{shard}{n}", "uri": f"{shard}{n}.jpg", "split": "", "captions": []} for n in range(5)
            ]
            writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))
    dataset.finish()
    return dataset


def job(source: ShardedDataset, tmp_path: Path, stage: Shout, retry: bool = False) -> ShardJob:
    outputs = [
        create_dataset(tmp_path / name, "manifest", MANIFEST_SCHEMA, config={}, shards=2) for name in ("one", "two")
    ]
    return ShardJob(source, (outputs[0], outputs[1]), stage, retry)


def run(job: ShardJob) -> None:
    with job.stage.open() as process:
        for shard in job.pending_shards():
            job.run(shard, process)


def ids(dataset: ShardedDataset, shard: int) -> list[str]:
    found: list[str] = dataset.read(shard)["image_id"].to_pylist()
    return found


def test_each_image_becomes_a_row_or_a_failure_of_each_output(source: ShardedDataset, tmp_path: Path) -> None:
    done = job(source, tmp_path, Shout({"01", "14"}))
    run(done)
    done.finish(1.0)
    for output in done.outputs:
        assert ids(output, 0) == ["00", "02", "03", "04"]
        assert ids(output, 1) == ["10", "11", "12", "13"]
        failures = output.read_failures(1)
        assert failures is not None
        assert failures.to_pylist() == [
            {"image_id": "14", "uri": "14.jpg", "stage": "fetch", "error": "Gone", "message": "not there"}
        ]
        assert output.is_complete()


def test_finished_shards_are_skipped(source: ShardedDataset, tmp_path: Path) -> None:
    stage = Shout()
    first = job(source, tmp_path, stage)
    with stage.open() as process:
        first.run(0, process)
        first.run(0, process)
    run(job(source, tmp_path, stage))
    assert sorted(stage.seen) == [f"{shard}{n}" for shard in range(2) for n in range(5)]


def test_shard_without_one_output_is_processed_again(source: ShardedDataset, tmp_path: Path) -> None:
    first = job(source, tmp_path, Shout())
    run(first)
    first.outputs[1].remove_marker(1)
    assert first.pending_shards() == [1]
    run(first)
    assert first.pending_shards() == []


def test_retry_processes_failed_images_only_and_keeps_the_order(source: ShardedDataset, tmp_path: Path) -> None:
    run(job(source, tmp_path, Shout({"01", "03", "14"})))
    again = Shout({"03"})
    retried = job(source, tmp_path, again, retry=True)
    assert retried.pending_shards() == [0, 1]
    run(retried)
    assert again.seen == ["01", "03", "14"]
    for output in retried.outputs:
        assert ids(output, 0) == ["00", "01", "02", "04"]
        assert ids(output, 1) == ["10", "11", "12", "13", "14"]
        assert [output.read_markers()[shard].failures for shard in range(2)] == [1, 0]
        assert output.read_failures(1) is None
        assert output.verify() == []


def test_unsuccessful_retry_changes_nothing(source: ShardedDataset, tmp_path: Path) -> None:
    first = job(source, tmp_path, Shout({"01"}))
    run(first)
    before = first.outputs[0].read_markers()
    run(job(source, tmp_path, Shout({"01"}), retry=True))
    assert first.outputs[0].read_markers() == before


def test_failures_are_not_retried_by_default(source: ShardedDataset, tmp_path: Path) -> None:
    run(job(source, tmp_path, Shout({"01"})))
    assert job(source, tmp_path, Shout()).pending_shards() == []


def test_interrupted_retry_leaves_the_shard_pending(source: ShardedDataset, tmp_path: Path) -> None:
    run(job(source, tmp_path, Shout({"01"})))
    dying = job(source, tmp_path, Shout(), retry=True)
    marker = tmp_path / "one" / "_shards" / "part-00000.json"
    with (
        dying.stage.open() as process,
        pytest.raises(StorageError, match=r"part-00000\.parquet cannot be accessed: disk full"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(
            type(dying.source.folder), "_publish_local", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
        )
        dying.run(0, process)
    assert not marker.exists()
    run(job(source, tmp_path, Shout()))
    assert ids(dying.outputs[0], 0) == ["00", "01", "02", "03", "04"]
