from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import features_schema
from captionlib.data.shards.writer import write_shard

WORDS = ["zero", "one", "two", "three"]


@pytest.fixture
def features(tmp_path: Path) -> ShardedDataset:
    """64 images of four kinds with features of four values."""
    return write_features(tmp_path / "features", 5 * np.eye(4))


def describe(kind: int) -> list[str]:
    return [f"this is {WORDS[kind]}", f"it is a {WORDS[kind]} again"]


def write_features(
    folder: Path, patterns: npt.NDArray[np.float64], describe: Callable[[int], list[str]] = describe
) -> ShardedDataset:
    """Writes 64 images of four kinds. The features are `patterns`, `[4, size]`, with noise, and `describe` captions."""
    generator = np.random.default_rng(0)
    size = patterns.shape[1]
    dataset = create_dataset(
        folder,
        "features",
        features_schema(size, "float16"),
        config={"encoder": {"model": "none", "shape": [size]}},
        shards=2,
    )
    for shard in range(2):
        kinds = generator.integers(0, 4, 32)
        rows = [
            {
                "image_id": f"{shard}-{number}",
                "uri": "",
                "split": "val" if number % 4 == 0 else "train",
                "captions": describe(kind),
                "features": (patterns[kind] + generator.normal(0, 0.1, size)).astype(np.float16),
            }
            for number, kind in enumerate(kinds)
        ]
        with write_shard(dataset, shard, 32) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=dataset.schema))
    dataset.finish()
    return dataset
