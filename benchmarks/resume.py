"""Measures the time to resume a run with 99% of 10,000 shards finished, relative to reading the markers one by one.

A marker is a file that marks a shard as complete. The time is measured on a disk and on a local S3 server, whose
latency is a tenth of the latency of a remote server.
"""

import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.bars import report, run_benchmark
from benchmarks.s3_server import run_s3_server
from benchmarks.synthetic_shards import create_job, make_rows, write_rows
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.markers import MARKERS_FOLDER, Marker, part_name, to_json_with_checksum
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.stages import ShardJob
from captionlib.data.shards.writer import write_shard
from pipelines.run import RunConfig, run_job

SHARDS, EVERY, ROWS = 10_000, 100, 10


def prepare(folder: str) -> None:
    """Writes a manifest, and the markers and data files of an output without every hundredth shard.

    All shards of the manifest are equal. The data files of the output are empty, because a resumed run only lists them.
    """
    source = create_dataset(f"{folder}/manifest", "manifest", MANIFEST_SCHEMA, config={}, shards=SHARDS)
    with write_shard(source, 0, ROWS) as writer:
        writer.write(make_rows(0, ROWS))
    _copy_shards(source, writer.marker, source.folder.read("part-00000.parquet"), range(1, SHARDS))
    source.finish()
    features = create_job(source, f"{folder}/features").outputs[0]
    marker = replace(writer.marker, fingerprint=features.fingerprint, input_checksum=writer.marker.checksum)
    _copy_shards(features, marker, b"", (shard for shard in range(SHARDS) if shard % EVERY))


def _copy_shards(dataset: ShardedDataset, marker: Marker, content: bytes, shards: Iterable[int]) -> None:
    files = {}
    for shard in shards:
        files[f"{MARKERS_FOLDER}/{part_name(shard)}.json"] = to_json_with_checksum(asdict(replace(marker, shard=shard)))
        files[f"{part_name(shard)}.parquet"] = content
    dataset.folder.fs.makedirs(dataset.folder.path(MARKERS_FOLDER), exist_ok=True)
    dataset.folder.fs.pipe({dataset.folder.path(name): value for name, value in files.items()})


def open_job(folder: str, first_row_file: str = "") -> ShardJob:
    return create_job(open_dataset(f"{folder}/manifest").require_complete(), f"{folder}/features", first_row_file)


def time_one_by_one(folder: str) -> float:
    """Returns the seconds to read the marker of each shard in turn."""
    output = open_job(folder).outputs[0]
    began = time.time()
    finished = sum(output.read_marker_even_if_unfinished(shard) is not None for shard in range(SHARDS))
    seconds = time.time() - began
    assert finished == SHARDS - SHARDS // EVERY
    return seconds


def time_resume(folder: str) -> float:
    """Returns the seconds from the start of the run to the first row of the first shard."""
    with tempfile.TemporaryDirectory() as scratch:
        first_row_file = Path(scratch) / "first-row"
        began = time.time()
        run_job(open_job(folder, str(first_row_file)), "resume", RunConfig(progress=False))
        return float(first_row_file.read_text()) - began


def measure(name: str, folder: str) -> float:
    prepare(folder)
    slow = time_one_by_one(folder)
    quick = time_resume(folder)
    assert open_job(folder).outputs[0].is_complete()
    print(f"# {name}: markers one by one {slow:.2f} s, first new shard after {quick:.2f} s")
    return quick / slow


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        warm = write_rows(f"{scratch}/warm", 1, ROWS)  # loads lazily imported modules
        run_job(create_job(warm, f"{scratch}/warmed"), "warm", RunConfig(progress=False))
        measure("disk", f"{scratch}/disk")
    with run_s3_server() as server, server.as_default():
        report("resume", measure("s3", "s3://bucket/resume"), 0.05, at_least=False)


if __name__ == "__main__":
    run_benchmark(main)
