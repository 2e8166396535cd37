"""Measures the fraction of training time spent waiting for data that streams through a small shuffle buffer."""

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.bars import report, run_benchmark
from benchmarks.synthetic_features import write_features
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.loop import TrainingConfig

IMAGES, BUFFER_MEGABYTES = 3000, 4  # 24 MB of features: six buffers per epoch
CONFIG = CaptionerTrainingConfig(
    captioner=CaptionerConfig(hidden_size=256, embedding_size=256),
    training=TrainingConfig(epochs=2, optimizer="adam"),
    shuffle_buffer_megabytes=BUFFER_MEGABYTES,
)


def main() -> None:
    with TemporaryDirectory() as scratch:
        dataset = write_features(Path(scratch) / "features", IMAGES)
        history = train_captioner(dataset.folder.uri, Path(scratch) / "run", CONFIG, device="cpu", progress=False)
    for row in history:
        training = f"{row['total_seconds']:.1f} s of training so far, {row['data_wait_fraction']:.2%} waiting for data"
        print(f"# epoch {row['epoch']}: {training}")
    report("training-data-wait", history[-1]["data_wait_fraction"], 0.05, at_least=False)


if __name__ == "__main__":
    run_benchmark(main)
