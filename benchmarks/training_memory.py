"""Measures peak memory of training a captioner on 30,000 images relative to 3,000."""

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.bars import report
from benchmarks.synthetic_features import write_features
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.loop import TrainingConfig

FEW, MANY = 3_000, 30_000  # 25 and 246 MB of features
CONFIG = CaptionerTrainingConfig(
    captioner=CaptionerConfig(hidden_size=16, embedding_size=16),  # a small model, so that an epoch takes seconds
    training=TrainingConfig(epochs=1, optimizer="adam"),
    max_words=4,
    shuffle_buffer_megabytes=4,
)


def train(folder: Path) -> None:
    with TemporaryDirectory() as run:
        train_captioner(folder, run, CONFIG, device="cpu", progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak / (1e6 if sys.platform == "darwin" else 1e3))


def measure(images: int) -> float:
    """Returns the peak memory, in megabytes, of a process that trains on `images` images."""
    with TemporaryDirectory() as folder:
        write_features(Path(folder), images)
        command = [sys.executable, "-m", __spec__.name, "--in", folder]
        megabytes = float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"# {images:,} images: peak {megabytes:.0f} MB", flush=True)
    return megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        train(options.folder)
        return
    few, many = measure(FEW), measure(MANY)
    sys.exit(not report("training-memory-ratio", many / few, 1.2, at_least=False))


if __name__ == "__main__":
    main()
