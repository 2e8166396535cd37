"""Measures peak memory of `prepare` on 2,000,000 rows relative to 200,000. `--rows N` measures a single size."""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.bars import report
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


def measure(rows: int) -> dict[str, float]:
    """Prepares a table of `rows` rows in a separate process; returns seconds and megabytes."""
    with tempfile.TemporaryDirectory() as scratch:
        write_table(Path(scratch) / "table.csv", rows)
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, "--in", scratch], check=True, stdout=subprocess.PIPE
        )
    measured: dict[str, float] = json.loads(done.stdout)
    print(f"# {rows:,} rows: {measured['seconds']:.1f} s, peak {measured['megabytes']:.0f} MB", flush=True)
    return measured


def prepare_rows(folder: Path) -> None:
    began = time.monotonic()
    prepare(folder / "table.csv", folder / "manifest")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    megabytes = peak / (1e6 if sys.platform == "darwin" else 1e3)
    print(json.dumps({"seconds": time.monotonic() - began, "megabytes": megabytes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, help="measure only this number of rows")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        prepare_rows(options.folder)
    elif options.rows is not None:
        measure(options.rows)
    else:
        few, many = measure(FEW), measure(MANY)
        met = report("prepare-memory-ratio", many["megabytes"] / few["megabytes"], 1.3, at_least=False)
        sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
