"""Features with sentences as long as people's, drawn by a seed, for what measures training."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import features_schema
from captionlib.data.shards.writer import write_shard

__all__ = ["FEATURE_SIZE", "write_features"]

FEATURE_SIZE = 4096
SENTENCES = 5  # an image
_WORDS = 2500  # about as many as Flickr8k has
_LOG_MEAN, _LOG_DEVIATION, _LONGEST = 2.32, 0.356, 36  # of the lengths of its sentences
_SHARD_ROWS = 500


def write_features(folder: Path, images: int, validation: int = 20) -> ShardedDataset:
    """A features dataset; the first `validation` images are the split `val`, all others `train`.

    Lengths are those of Flickr8k: 10.8 words on average, deviation 3.8, the longest of 100 sentences about 23. Words
    are as frequent as Zipf has it.
    """
    draw = np.random.default_rng(0)
    names = np.array([f"w{number}" for number in range(_WORDS)])
    shares = 1 / np.arange(1, _WORDS + 1)
    shards = -(-images // _SHARD_ROWS)
    config = {"encoder": {"model": "drawn", "shape": [FEATURE_SIZE]}}
    schema = features_schema(FEATURE_SIZE, "float16")
    dataset = create_dataset(folder, "features", schema, config=config, shards=shards)
    for shard in range(shards):
        numbers = range(shard * _SHARD_ROWS, min((shard + 1) * _SHARD_ROWS, images))
        features = draw.standard_normal((len(numbers), FEATURE_SIZE), np.float32).astype(np.float16)
        rows = pa.RecordBatch.from_arrays(
            [
                pa.array([f"{number:09d}" for number in numbers]),
                pa.array([""] * len(numbers)),
                pa.array(["val" if number < validation else "train" for number in numbers]),
                pa.array([_sentences(draw, names, shares / shares.sum()) for _ in numbers], pa.list_(pa.string())),
                numpy_to_vectors(features),
            ],
            schema=schema,
        )
        with write_shard(dataset, shard, len(numbers)) as writer:
            writer.write(rows)
    dataset.finish()
    return dataset


def _sentences(draw: np.random.Generator, names: npt.NDArray[np.str_], shares: npt.NDArray[np.float64]) -> list[str]:
    lengths = np.clip(np.round(draw.lognormal(_LOG_MEAN, _LOG_DEVIATION, SENTENCES)), 1, _LONGEST).astype(int)
    words = draw.choice(names, size=lengths.sum(), p=shares)
    return [" ".join(part) for part in np.split(words, np.cumsum(lengths)[:-1])]
