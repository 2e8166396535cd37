"""Measures the overhead per shard of a pipeline over a loop that only reads and writes the files."""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.bars import report
from benchmarks.synthetic_shards import SCHEMA, add_features, create_job, write_rows
from captionlib.data.shards.dataset import ShardedDataset
from pipelines.run import RunConfig, run_job

SHARDS, ROWS, ROUNDS = 200, 1000, 5


def run_bare(source: ShardedDataset, folder: Path) -> float:
    """Returns the seconds to read every shard, add features and write a durable file."""
    folder.mkdir()
    began = time.perf_counter()
    for shard in range(source.shards):
        with (
            pq.ParquetFile(source.get_part_path(shard)) as manifest,  # does not verify checksums
            pq.ParquetWriter(folder / f"{shard}.parquet", SCHEMA, compression="zstd") as writer,
        ):
            for rows in manifest.iter_batches():
                writer.write_batch(add_features(rows))
        with (folder / f"{shard}.parquet").open("rb") as written:
            os.fsync(written.fileno())
    return time.perf_counter() - began


def run_pipeline(source: ShardedDataset, folder: Path) -> float:
    """Returns the seconds of the whole pipeline, from reading the manifest to writing `_SUCCESS`."""
    began = time.perf_counter()
    run_job(create_job(source, folder), "overhead", RunConfig(progress=False))
    return time.perf_counter() - began


def main() -> None:
    """Runs both alternately and reports the median overhead per shard."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = write_rows(folder / "manifest", SHARDS, ROWS)
        overheads = []
        for number in range(ROUNDS):
            bare = run_bare(source, folder / f"bare{number}")
            ours = run_pipeline(source, folder / f"features{number}")
            overheads.append((ours - bare) / SHARDS)
            print(f"# {SHARDS} shards of {ROWS} rows: bare {bare:.2f} s, pipeline {ours:.2f} s")
        sys.exit(not report("shard-overhead-milliseconds", 1000 * statistics.median(overheads), 50, at_least=False))


if __name__ == "__main__":
    main()
