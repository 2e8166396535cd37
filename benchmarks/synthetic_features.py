"""Writes random features with captions as long as those of Flickr8k, for benchmarks of training."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.synthetic_datasets import write_dataset
from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.schemas import features_schema

__all__ = ["CAPTIONS_PER_IMAGE", "FEATURE_SIZE", "write_features"]

FEATURE_SIZE = 4096
CAPTIONS_PER_IMAGE = 5
_WORDS = 2500  # about the size of Flickr8k's vocabulary
_LOG_MEAN, _LOG_DEVIATION, _MAX_LENGTH = 2.32, 0.356, 36  # log-normal fit of its caption lengths
_SHARD_ROWS = 500


def write_features(folder: Path, images: int, validation: int = 20) -> ShardedDataset:
    """Writes a features dataset. The first `validation` images are in the split `val`, all others in `train`.

    Captions are as long as in Flickr8k: 10.8 words on average, with a standard deviation of 3.8. The longest of 100 has
    about 23 words. Word frequencies follow Zipf's law.
    """
    generator = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(_WORDS)])
    frequencies = 1 / np.arange(1, _WORDS + 1)

    def make_rows(shard: int) -> pa.RecordBatch:
        numbers = range(shard * _SHARD_ROWS, min((shard + 1) * _SHARD_ROWS, images))
        features = generator.standard_normal((len(numbers), FEATURE_SIZE), np.float32).astype(np.float16)
        return pa.RecordBatch.from_pydict(
            {
                "image_id": [f"{number:09d}" for number in numbers],
                "uri": [""] * len(numbers),
                "split": ["val" if number < validation else "train" for number in numbers],
                "captions": [_sample_captions(generator, words, frequencies / frequencies.sum()) for _ in numbers],
                "features": numpy_to_vectors(features),
            }
        )

    config = {"encoder": {"model": "random", "shape": [FEATURE_SIZE]}}
    schema = features_schema(FEATURE_SIZE, "float16")
    return write_dataset(folder, "features", schema, -(-images // _SHARD_ROWS), make_rows, config)


def _sample_captions(
    generator: np.random.Generator, words: npt.NDArray[np.str_], probabilities: npt.NDArray[np.float64]
) -> list[str]:
    lengths = np.round(generator.lognormal(_LOG_MEAN, _LOG_DEVIATION, CAPTIONS_PER_IMAGE))
    lengths = np.clip(lengths, 1, _MAX_LENGTH).astype(int)
    sampled = generator.choice(words, size=lengths.sum(), p=probabilities)
    return [" ".join(caption) for caption in np.split(sampled, np.cumsum(lengths)[:-1])]
