"""Measures peak memory of `extract-features` on 20,000 images relative to 2,000, with a small network."""

import statistics
import tempfile
from pathlib import Path

from benchmarks.bars import read_peak_megabytes, report, run_benchmark, run_in_new_process
from benchmarks.synthetic_images import write_images, write_manifest
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.extraction import ExtractionConfig
from pipelines.extract_features import extract_features
from pipelines.run import RunConfig

FILES, SHARD_SIZE = 200, 1000
ENCODER = EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", pooling="mean")


def extract(count: int, folder: Path) -> float:
    """Extracts features of `count` images in this process. Returns its peak memory in megabytes."""
    uris = [str(path) for path in sorted((folder / "images").iterdir())]
    manifest = Path(tempfile.mkdtemp(dir=folder))
    write_manifest(manifest, [uris[number % FILES] for number in range(count)], SHARD_SIZE)
    features = Path(tempfile.mkdtemp(dir=folder))
    extract_features(manifest, features, ExtractionConfig(ENCODER), run=RunConfig(progress=False))
    return read_peak_megabytes()


def main() -> None:
    """Runs 20,000 images once and 2,000 images three times, because a short run may end before memory peaks."""
    with tempfile.TemporaryDirectory() as scratch:
        write_images(Path(scratch) / "images", FILES)
        few = statistics.median(measure(2_000, Path(scratch)) for _ in range(3))
        many = measure(20_000, Path(scratch))
    report("extract-memory", many / few, 1.1, at_least=False)


def measure(count: int, folder: Path) -> float:
    megabytes = run_in_new_process(extract, count, folder)
    print(f"# {count:,} images: {megabytes:.0f} MB", flush=True)
    return megabytes


if __name__ == "__main__":
    run_benchmark(main)
