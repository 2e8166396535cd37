"""What a shard costs beyond reading and writing its files: a whole pipeline against a loop that does only that."""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.bars import report
from benchmarks.synthetic_shards import SCHEMA, add_features, job_over, write_rows
from captionlib.data.shards.dataset import ShardedDataset
from pipelines.run import RunConfig, run_job

SHARDS, ROWS, ROUNDS = 200, 1000, 5


def run_bare(source: ShardedDataset, folder: Path) -> float:
    """Seconds to read every shard, make features up and write a file that survives a machine that dies."""
    folder.mkdir()
    began = time.perf_counter()
    for shard in range(source.shards):
        with pq.ParquetWriter(folder / f"{shard}.parquet", SCHEMA, compression="zstd") as writer:
            for rows in source.read_batches(shard):
                writer.write_batch(add_features(rows))
        with (folder / f"{shard}.parquet").open("rb") as written:
            os.fsync(written.fileno())
    return time.perf_counter() - began


def run_pipeline(source: ShardedDataset, folder: Path) -> float:
    """Seconds of the whole command, from the first look at the manifest to `_SUCCESS`."""
    began = time.perf_counter()
    run_job(job_over(source, folder), "overhead", RunConfig(progress=False))
    return time.perf_counter() - began


def main() -> None:
    """Runs both in turn and reports the median of what a shard costs more."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = write_rows(folder / "manifest", SHARDS, ROWS)
        more = []
        for number in range(ROUNDS):
            bare = run_bare(source, folder / f"bare{number}")
            ours = run_pipeline(source, folder / f"features{number}")
            more.append((ours - bare) / SHARDS)
            print(f"# {SHARDS} shards of {ROWS} rows: bare {bare:.2f} s, pipeline {ours:.2f} s")
        sys.exit(not report("shard-overhead-milliseconds", 1000 * statistics.median(more), 50, at_least=False))


if __name__ == "__main__":
    main()
