"""Measures peak memory of training a captioner on 30,000 images relative to 3,000."""

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.bars import read_peak_megabytes, report, run_benchmark, run_in_new_process
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


def train(folder: str) -> float:
    with TemporaryDirectory() as run:
        train_captioner(folder, run, CONFIG, device="cpu", progress=False)
    return read_peak_megabytes()


def measure(images: int) -> float:
    with TemporaryDirectory() as folder:
        write_features(Path(folder), images)
        megabytes = run_in_new_process(train, folder)
    print(f"# {images:,} images: peak {megabytes:.0f} MB", flush=True)
    return megabytes


def main() -> None:
    few, many = measure(FEW), measure(MANY)
    report("training-memory-ratio", many / few, 1.2, at_least=False)


if __name__ == "__main__":
    run_benchmark(main)
