from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.metrics.metric import MetricsFilter

from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.stages import ProcessRows, ReportFailure, ShardJob
from captionlib.data.shards.writer import write_shard
from captionlib.errors import FetchError
from pipelines.process_shards import ProcessShards
from pipelines.run import RunConfig, run_job


@dataclass(frozen=True)
class FailFirst:
    """Copies rows. The first image of each shard fails. Fails if the output is marked as complete meanwhile."""

    output: str
    columns: None = None

    def open(self) -> AbstractContextManager[ProcessRows]:
        return nullcontext(self.process)

    def process(self, batches: Iterator[pa.RecordBatch], fail: ReportFailure) -> Iterator[tuple[pa.RecordBatch, ...]]:
        assert not open_dataset(self.output).is_complete()
        for batch in batches:
            fail(batch.slice(0, 1).to_pylist()[0], FetchError("NotFound", "not found"))
            yield (batch.slice(1),)


@pytest.fixture
def job(tmp_path: Path) -> ShardJob:
    source = create_dataset(tmp_path / "source", "manifest", MANIFEST_SCHEMA, config={}, shards=2)
    for shard in range(2):
        write(source, shard, "old")
    source.finish()
    output = create_dataset(tmp_path / "output", "manifest", MANIFEST_SCHEMA, config={}, source=source)
    return ShardJob(source, (output,), FailFirst(str(tmp_path / "output")))


def write(dataset: ShardedDataset, shard: int, uri: str) -> None:
    rows = [{"image_id": f"{shard}{n}", "uri": uri, "split": "", "captions": []} for n in range(3 + shard)]
    with write_shard(dataset, shard, len(rows)) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))


def test_images_and_failures_are_counted(job: ShardJob) -> None:
    pipeline = beam.Pipeline()
    _ = pipeline | ProcessShards(job, [0, 1], max_failure_ratio=None)
    result = pipeline.run()
    result.wait_until_finish()
    counters = result.metrics().query(MetricsFilter().with_namespace("ProcessShards"))["counters"]
    assert {counter.key.metric.name: counter.committed for counter in counters} == {"images": 7, "failures": 2}


def test_outputs_are_incomplete_while_shards_are_rewritten(job: ShardJob) -> None:
    run = RunConfig(progress=False)
    assert run_job(job, "test", run).failures == 2
    assert job.outputs[0].is_complete()
    write(job.source, 1, "new")
    assert run_job(job, "test", run).failures == 2  # the stage fails if the output is complete meanwhile
    assert job.outputs[0].is_complete()
    assert job.outputs[0].read(1, ["uri"])["uri"].to_pylist() == ["new"] * 3
