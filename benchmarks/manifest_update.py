"""Measures an update of a manifest with nothing new against listing the source and reading the manifest once."""

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click

from captionlib.data.ingestion.prepare import PrepareConfig, prepare
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.sources.formats import read_source
from captionlib.data.sources.rows import SkipCounter, SourceOptions

_BAR = 1.5


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--rows", default=1_000_000, show_default=True, help="Number of images.")
@click.option("--repeats", default=3, show_default=True, help="Number of measurements; the median is printed.")
def main(folder: Path, rows: int, repeats: int) -> None:
    """Writes a table of web addresses and its manifest to FOLDER, and prints the ratio of CPU times."""
    source, manifest = folder / "table.csv", folder / "manifest"
    folder.mkdir(parents=True, exist_ok=True)
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

    seconds = {step.__name__: _measure(step, repeats) for step in (update, list_source, read_manifest)}
    for name, value in seconds.items():
        click.echo(f"{name:<14} {value:6.2f} s of CPU time")
    ratio = seconds["update"] / (seconds["list_source"] + seconds["read_manifest"])
    click.echo(f"ratio          {ratio:6.2f} (expected at most {_BAR})")


def _measure(step: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return median(times)


if __name__ == "__main__":
    main()
