"""Measures an update of a manifest without changes against listing the source and reading the manifest once."""

import argparse
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.bars import report
from captionlib.data.ingestion.prepare import PrepareConfig, prepare
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.sources.formats import read_source
from captionlib.data.sources.rows import SkipCounter, SourceOptions

REPEATS = 3


def compare_cpu_times(folder: Path, rows: int) -> float:
    """Returns the CPU time of an update divided by the CPU time of listing the source and reading the manifest."""
    source, manifest = folder / "table.csv", folder / "manifest"
    with source.open("w") as file:
        file.write("url,caption,split\n")
        for number in range(rows):
            file.write(f'https://example.org/{number:09d}.jpg,"A dog, number {number}, runs over the grass.",train\n')
    config = PrepareConfig(check_images=False)
    prepare(source, manifest, config)

    def update() -> None:
        assert prepare(source, manifest, config).already_prepared

    def list_source() -> None:
        deque(read_source("table", [os.fspath(source)], SourceOptions(), SkipCounter()), maxlen=0)

    def read_manifest() -> None:
        dataset = open_dataset(manifest)
        for shard in range(dataset.shards):
            dataset.read(shard)

    seconds = {step.__name__: _measure(step) for step in (update, list_source, read_manifest)}
    print("# " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    return seconds["update"] / (seconds["list_source"] + seconds["read_manifest"])


def _measure(step: Callable[[], None]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ratio = compare_cpu_times(Path(scratch), options.rows)
    sys.exit(not report("manifest-update", ratio, 1.5, at_least=False))


if __name__ == "__main__":
    main()
