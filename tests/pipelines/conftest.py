import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.extraction import ExtractionConfig
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.loop import TrainingConfig
from pipelines.extract_features import extract_features
from pipelines.run import RunConfig

COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white"]


def write_manifest(folder: Path, uris: list[str], shard_size: int = 4) -> ShardedDataset:
    starts = range(0, len(uris), shard_size)
    dataset = create_dataset(folder, "manifest", MANIFEST_SCHEMA, config={"uris": uris}, shards=len(starts))
    for shard, start in enumerate(starts):
        rows = [
            {
                "image_id": Path(uri).name,
                "uri": uri,
                "split": "train" if (start + number) % 4 else "val",
                "captions": [f"a {Path(uri).stem} field", f"all of it is {Path(uri).stem}"],
            }
            for number, uri in enumerate(uris[start : start + shard_size])
        ]
        with write_shard(dataset, shard, len(rows)) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))
    dataset.finish()
    return dataset


def write_images(folder: Path) -> list[str]:
    """Writes eight images of one color each and two broken files."""
    folder.mkdir()
    for color in COLORS:
        Image.new("RGB", (80, 60), color).save(folder / f"{color}.png")
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    return [str(folder / f"{name}.png") for name in [*COLORS[:3], "broken", *COLORS[3:], "missing"]]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The images of `write_images`. Tests must not change them."""
    return write_images(tmp_path_factory.mktemp("rendered") / "images")


@pytest.fixture
def manifest(tmp_path: Path, images: list[str]) -> ShardedDataset:
    return write_manifest(tmp_path / "manifest", images)


@pytest.fixture(scope="session")
def small_encoder() -> ExtractionConfig:
    encoder = EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", pooling="mean")
    return ExtractionConfig(encoder, batch_size=3)


@pytest.fixture(scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory, images: list[str], small_encoder: ExtractionConfig) -> Path:
    """The features of the images. Tests must not change them."""
    folder = tmp_path_factory.mktemp("extracted")
    manifest = write_manifest(folder / "manifest", images)
    run = RunConfig(max_failure_ratio=0.5, progress=False)
    extract_features(manifest.folder.uri, folder / "features", small_encoder, run=run)
    return folder / "features"


@pytest.fixture
def features(tmp_path: Path, extracted: Path) -> Path:
    """A copy of the features of the images."""
    return shutil.copytree(extracted, tmp_path / "features")


@pytest.fixture(scope="session")
def trained(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner. Tests must not change it."""
    config = CaptionerTrainingConfig(
        captioner=CaptionerConfig(hidden_size=16, embedding_size=16, dropout=0.0),
        training=TrainingConfig(epochs=2),
        min_count=1,
        batch_images=4,
    )
    folder = tmp_path_factory.mktemp("trained") / "captioner"
    train_captioner(extracted, folder, config, device="cpu", progress=False)
    return folder


@pytest.fixture
def captioner(tmp_path: Path, trained: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "captioner")
