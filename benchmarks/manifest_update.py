"""Measures an update of a manifest without changes against listing the source and reading the manifest once.

The second figure is for a source whose rows are in a different order than those of the manifest.
"""

import argparse
import os
import tempfile
from collections import deque
from pathlib import Path
from statistics import median

from benchmarks.bars import measure_cpu, report, run_benchmark
from captionlib.data.ingestion.prepare import PrepareConfig, prepare
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.sources.formats import read_source
from captionlib.data.sources.rows import SkipCounter, SourceOptions

BAR = 1.5
CONFIG = PrepareConfig(check_images=False)


def write_tables(folder: Path, rows: int) -> None:
    """Writes a table of web addresses with captions, and one with the same rows, the first of which comes last."""
    header, *lines = [
        "url,caption,split\n",
        *(
            f'https://example.org/{number:09d}.jpg,"A dog, number {number}, runs over the grass.",train\n'
            for number in range(rows)
        ),
    ]
    (folder / "same.csv").write_text("".join([header, *lines]))
    (folder / "moved.csv").write_text("".join([header, *lines[1:], lines[0]]))


def update(folder: Path, table: str) -> None:
    assert prepare(folder / table, folder / "manifest", CONFIG).already_prepared


def list_and_read(folder: Path) -> None:
    rows = read_source("table", [os.fspath(folder / "same.csv")], SourceOptions(), SkipCounter())
    deque(rows, maxlen=0)
    dataset = open_dataset(folder / "manifest")
    for shard in range(dataset.shards):
        dataset.read(shard)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of images (default 1,000,000)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tables(folder, options.rows)
        prepare(folder / "same.csv", folder / "manifest", CONFIG)
        same, moved = [], []
        for _ in range(3):
            baseline = measure_cpu(lambda: list_and_read(folder))
            same.append(measure_cpu(lambda: update(folder, "same.csv")) / baseline)
            moved.append(measure_cpu(lambda: update(folder, "moved.csv")) / baseline)
            print(f"# baseline {baseline:.1f} s of CPU time, ratios {same[-1]:.2f} and {moved[-1]:.2f}", flush=True)
    report("manifest-update-ratio", median(same), BAR, at_least=False)
    report("manifest-update-other-order-ratio", median(moved), BAR, at_least=False)


if __name__ == "__main__":
    run_benchmark(main)
