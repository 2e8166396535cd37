"""Peak memory of `extract-features` on ten times as many images; a small network, so that it takes minutes."""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.bars import report
from benchmarks.drawings import draw_images, write_manifest
from captionlib.models.encoder import EncoderConfig
from captionlib.models.extraction import ExtractionConfig
from pipelines.extract_features import extract_features
from pipelines.run import RunConfig

DRAWN, SHARD_SIZE = 200, 1000
ENCODER = EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", pooling="mean")


def run_once(count: int, folder: Path) -> None:
    """Extracts `count` images in this process and prints its peak memory in kilobytes."""
    uris = [str(path) for path in sorted((folder / "images").iterdir())]
    write_manifest(folder / f"manifest{count}", [uris[number % DRAWN] for number in range(count)], SHARD_SIZE)
    config = ExtractionConfig(ENCODER)
    extract_features(folder / f"manifest{count}", folder / f"features{count}", config, run=RunConfig(progress=False))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    """Runs 2,000 and 20,000 images, each in a process of its own."""
    if len(sys.argv) == 3:
        run_once(int(sys.argv[1]), Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        draw_images(Path(scratch) / "images", DRAWN)
        peaks = []
        for count in (2_000, 20_000):
            command = [sys.executable, "-m", "benchmarks.extract_memory", str(count), scratch]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks.append(int(printed.split()[-1]))
            print(f"# {count:,} images: {peaks[-1] / 1024:.0f} MB")
    sys.exit(not report("extract-memory", peaks[1] / peaks[0], 1.1, at_least=False))


if __name__ == "__main__":
    main()
