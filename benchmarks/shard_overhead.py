"""Measures the overhead per shard of a pipeline over a loop that only reads and writes the files."""

import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.bars import measure_seconds, report, run_benchmark
from benchmarks.synthetic_shards import SCHEMA, add_features, create_job, write_rows
from captionlib.data.shards.dataset import ShardedDataset
from pipelines.run import RunConfig, run_job

SHARDS, ROWS, ROUNDS = 200, 1000, 5


def run_bare(source: ShardedDataset, folder: Path) -> None:
    """Reads every shard, adds features and writes a durable file."""
    folder.mkdir()
    for shard in range(source.shards):
        with (
            pq.ParquetFile(source.get_part_path(shard)) as manifest,  # does not verify checksums
            pq.ParquetWriter(folder / f"{shard}.parquet", SCHEMA, compression="zstd") as writer,
        ):
            for rows in manifest.iter_batches():
                writer.write_batch(add_features(rows))
        with (folder / f"{shard}.parquet").open("rb") as written:
            os.fsync(written.fileno())


def run_pipeline(source: ShardedDataset, folder: Path) -> float:
    """Returns the seconds of the whole pipeline, from reading the manifest to writing `_SUCCESS`."""
    return measure_seconds(lambda: run_job(create_job(source, folder), "overhead", RunConfig(progress=False)))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = write_rows(folder / "manifest", SHARDS, ROWS)
        overheads = []
        for number in range(ROUNDS):
            bare = measure_seconds(partial(run_bare, source, folder / f"bare{number}"))
            ours = run_pipeline(source, folder / f"features{number}")
            overheads.append((ours - bare) / SHARDS)
            print(f"# {SHARDS} shards of {ROWS} rows: bare {bare:.2f} s, pipeline {ours:.2f} s")
        report("shard-overhead-milliseconds", 1000 * statistics.median(overheads), 50, at_least=False)


if __name__ == "__main__":
    run_benchmark(main)
