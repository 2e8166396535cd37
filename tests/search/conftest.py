from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pytest

from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import captions_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DecodeError

CAPTIONS = [
    ("a1", "a dog runs on the grass", -4.5),
    ("a2", "Two dogs catch a frisbee", -3.25),
    ("b1", "a woman holds a hot dog", -9.0),
    ("b2", "a café on a beach", -1.5),
]


def rows(*captions: tuple[str, str, float]) -> pa.RecordBatch:
    values = [
        {
            "image_id": image_id,
            "uri": f"images/{image_id}.jpg",
            "split": "test",
            "caption": caption,
            "log_prob": log_prob,
            "tokens": len(caption.split()) + 1,
            "candidates": [{"caption": caption, "log_prob": log_prob}, {"caption": "a dog", "log_prob": log_prob - 1}],
        }
        for image_id, caption, log_prob in captions
    ]
    return pa.RecordBatch.from_pylist(values, schema=captions_schema())


def write_captions(address: str) -> ShardedDataset:
    """Writes two complete shards, one of them with a failure, and an incomplete one."""
    dataset = create_dataset(address, "captions", captions_schema(), config={"beam_width": 5}, shards=3)
    with write_shard(dataset, 0, 2) as writer:
        writer.write(rows(*CAPTIONS[:2]))
    with write_shard(dataset, 1, 3) as writer:
        writer.write(rows(*CAPTIONS[2:]))
        writer.write_failure({"image_id": "bad", "uri": "images/bad.jpg"}, DecodeError("Truncated", "ends early"))
    with write_shard(dataset, 2, 1) as writer:
        writer.write(rows(("c1", "a shard that is being replaced", -1.0)))
    dataset.remove_marker(2)
    return dataset


@pytest.fixture(params=["local", "local with special characters", "memory"])
def captions(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    addresses = {
        "local": str(tmp_path / "captions"),
        "local with special characters": str(tmp_path / "it's a, {folder} %20" / "captions"),
        "memory": f"memory://{uuid4().hex}/captions",
    }
    write_captions(addresses[request.param])
    return addresses[request.param]


@pytest.fixture
def local(tmp_path: Path) -> str:
    write_captions(str(tmp_path / "captions"))
    return str(tmp_path / "captions")
