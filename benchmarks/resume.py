"""How soon a run goes on where 99% of 10,000 shards are done, against looking for their markers one by one.

On a disk, and on an S3 server on this machine, which answers within milliseconds where one far away takes tens of them.
"""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import fsspec

from benchmarks.bars import report
from benchmarks.synthetic_shards import job_over, write_rows
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.shards.markers import MARKERS_FOLDER, part_name, to_json
from captionlib.data.shards.stages import ShardJob
from pipelines.run import RunConfig, run_job

SHARDS, EVERY, ROWS = 10_000, 100, 10


def prepare(folder: str) -> None:
    """An output that lacks every hundredth shard, and of the manifest what these are made from: the first one each."""
    source = replace(write_rows(f"{folder}/manifest", 1, ROWS), shards=SHARDS)
    job = job_over(source, f"{folder}/features")
    first = source.folder.read("part-00000.parquet")
    pending = range(0, SHARDS, EVERY)
    for dataset, shards in ((source, pending), (job.outputs[0], sorted(set(range(SHARDS)) - set(pending)))):
        marker = replace(source.read_markers([0])[0], fingerprint=dataset.fingerprint)
        markers = {
            dataset.folder.path(f"{MARKERS_FOLDER}/{part_name(shard)}.json"): to_json(
                asdict(replace(marker, shard=shard))
            )
            for shard in shards
        }
        dataset.folder.fs.makedirs(dataset.folder.path(MARKERS_FOLDER), exist_ok=True)
        dataset.folder.fs.pipe(markers)
    for shard in pending:
        source.folder.write(f"{part_name(shard)}.parquet", first)


def open_job(folder: str, note: str = "") -> ShardJob:
    """The job over what `prepare` wrote."""
    return job_over(replace(open_dataset(f"{folder}/manifest"), shards=SHARDS), f"{folder}/features", note)


def time_one_by_one(folder: str) -> float:
    """Seconds to look for the marker of each shard in its turn."""
    output = open_job(folder).outputs[0]
    began = time.time()
    done = sum(output.read_marker(shard) is not None for shard in range(SHARDS))
    seconds = time.time() - began
    assert done == SHARDS - SHARDS // EVERY
    return seconds


def time_resume(folder: str) -> float:
    """Seconds from the start of the run until the first row of the first shard is there."""
    with tempfile.TemporaryDirectory() as scratch:
        note = Path(scratch) / "first"
        began = time.time()
        run_job(open_job(folder, str(note)), "resume", RunConfig(progress=False))
        return float(note.read_text()) - began


@contextmanager
def s3_server() -> Iterator[None]:
    """An S3 server that `s3://` leads to, with a bucket."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1000):
            try:
                urlopen(url).close()
                break
            except URLError:
                time.sleep(0.1)
        fsspec.config.conf["s3"] = {"key": "x", "secret": "x", "endpoint_url": url}
        fsspec.filesystem("s3").mkdir("bucket")
        yield
    finally:
        server.terminate()
        server.wait()


def measure(name: str, folder: str) -> float:
    """The ratio on one file system, once a small run has loaded what the first run of a process loads."""
    prepare(folder)
    slow = time_one_by_one(folder)
    quick = time_resume(folder)
    print(f"# {name}: markers one by one {slow:.2f} s, first new shard after {quick:.2f} s")
    return quick / slow


def main() -> None:
    """Measures both; the bar is for the object store."""
    with tempfile.TemporaryDirectory() as scratch:
        warm = write_rows(f"{scratch}/warm", 1, ROWS)
        run_job(job_over(warm, f"{scratch}/warmed"), "warm", RunConfig(progress=False))
        measure("disk", f"{scratch}/disk")
    with s3_server():
        sys.exit(not report("resume", measure("s3", "s3://bucket/resume"), 0.05, at_least=False))


if __name__ == "__main__":
    main()
