"""Measures peak memory of `extract-features` on 20,000 images relative to 2,000, with a small network."""

import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.bars import report
from benchmarks.synthetic_images import write_images, write_manifest
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.extraction import ExtractionConfig
from pipelines.extract_features import extract_features
from pipelines.run import RunConfig

FILES, SHARD_SIZE = 200, 1000
ENCODER = EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", pooling="mean")


def run_once(count: int, folder: Path) -> None:
    """Extracts features of `count` images in this process and prints its peak memory in kilobytes."""
    uris = [str(path) for path in sorted((folder / "images").iterdir())]
    manifest = Path(tempfile.mkdtemp(dir=folder))
    write_manifest(manifest, [uris[number % FILES] for number in range(count)], SHARD_SIZE)
    features = Path(tempfile.mkdtemp(dir=folder))
    extract_features(manifest, features, ExtractionConfig(ENCODER), run=RunConfig(progress=False))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    """Runs 20,000 images once and 2,000 images three times, because a short run may end before memory peaks."""
    if len(sys.argv) == 3:
        run_once(int(sys.argv[1]), Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_images(Path(scratch) / "images", FILES)
        few = statistics.median(measure(2_000, scratch) for _ in range(3))
        many = measure(20_000, scratch)
    sys.exit(not report("extract-memory", many / few, 1.1, at_least=False))


def measure(count: int, scratch: str) -> int:
    """Returns the peak memory, in kilobytes, of a process that extracts features of `count` images."""
    command = [sys.executable, "-m", "benchmarks.extract_memory", str(count), scratch]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    print(f"# {count:,} images: {peak / 1024:.0f} MB", flush=True)
    return peak


if __name__ == "__main__":
    main()
