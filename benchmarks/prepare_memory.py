"""Measures peak memory of `prepare` on 2,000,000 rows relative to 200,000. `--rows N` measures a single size."""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.bars import measure_seconds, read_peak_megabytes, report, run_benchmark, run_in_new_process
from captionlib.data.ingestion.prepare import prepare

FEW, MANY = 200_000, 2_000_000


def write_table(path: Path, rows: int) -> None:
    """Writes a CSV of image addresses with captions, not sorted by id."""
    with path.open("w", encoding="utf-8") as file:
        file.write("image_id,uri,caption,split\n")
        for number in range(rows):
            name = number * 7_919 % 1_000_000_007
            split = "val" if number % 20 == 0 else "train"
            file.write(
                f"{name:010d},https://example.org/{name % 1000:03d}/{name:010d}.jpg,image {number} of many,{split}\n"
            )


def measure(rows: int) -> float:
    """Returns the peak memory, in megabytes, of a process that prepares a table."""
    with tempfile.TemporaryDirectory() as scratch:
        write_table(Path(scratch) / "table.csv", rows)
        seconds, megabytes = run_in_new_process(prepare_table, Path(scratch))
    print(f"# {rows:,} rows: {seconds:.1f} s, peak {megabytes:.0f} MB", flush=True)
    return megabytes


def prepare_table(folder: Path) -> tuple[float, float]:
    seconds = measure_seconds(partial(prepare, folder / "table.csv", folder / "manifest"))
    return seconds, read_peak_megabytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, help="measure only this number of rows")
    options = parser.parse_args()
    if options.rows is not None:
        measure(options.rows)
    else:
        few, many = measure(FEW), measure(MANY)
        report("prepare-memory-ratio", many / few, 1.3, at_least=False)


if __name__ == "__main__":
    run_benchmark(main)
