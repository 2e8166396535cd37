from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from captionlib.data.datasets import create_dataset
from captionlib.data.schemas import MANIFEST
from captionlib.data.shard_writer import write_shard
from captionlib.data.shards import ShardedDataset
from captionlib.models.encoder import EncoderConfig
from captionlib.models.extraction import ExtractionConfig

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white"]


def write_manifest(folder: Path, uris: list[str], shard_size: int = 4) -> ShardedDataset:
    starts = range(0, len(uris), shard_size)
    dataset = create_dataset(folder, "manifest", MANIFEST, config={"uris": uris}, shards=len(starts))
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
            writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST))
    dataset.finish()
    return dataset


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Eight images of one colour each, and two that are none."""
    folder = tmp_path / "images"
    folder.mkdir()
    for colour in COLOURS:
        Image.new("RGB", (80, 60), colour).save(folder / f"{colour}.png")
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    return [str(folder / f"{name}.png") for name in [*COLOURS[:3], "broken", *COLOURS[3:], "missing"]]


@pytest.fixture
def manifest(tmp_path: Path, images: list[str]) -> ShardedDataset:
    return write_manifest(tmp_path / "manifest", images)


@pytest.fixture
def small_encoder() -> ExtractionConfig:
    encoder = EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", pooling="mean")
    return ExtractionConfig(encoder, batch_size=3)
