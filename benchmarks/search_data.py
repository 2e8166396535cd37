"""Generates synthetic captions with vectors, and their index, once; keeps them in `.bench/`.

Word frequencies follow Zipf's law. Image vectors form clusters. Sentence vectors are near the same clusters but
shifted, like the modality gap of real embeddings.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.bars import read_peak_megabytes
from benchmarks.synthetic_datasets import write_dataset
from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.shards.schemas import captions_schema, embeddings_schema
from captionlib.search.config import IndexConfig
from pipelines.build_index import build_index
from pipelines.run import RunConfig

__all__ = ["SIZE", "WORDS", "SearchData", "prepare_data", "sample_captions"]

SIZE = 256
SHARDS = 16
CLUSTERS = 2000
WORDS = [f"{first}{second}{third}o" for first in "bdfgklmnprst" for second in "aeiou" for third in "bdfgklmnprstvz"]

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SearchData:
    """Captions, embeddings and their index.

    Attributes:
        folder: folder of the datasets and the index.
        rows: number of captions.
    """

    folder: Path
    rows: int

    @property
    def index(self) -> Path:
        return self.folder / "index"

    @property
    def captions(self) -> Path:
        return self.folder / "captions"

    @cached_property
    def centers(self) -> Vectors:
        return _normalize(np.random.default_rng(1).normal(size=(CLUSTERS, SIZE)))

    def image_vectors(self, count: int, seed: int) -> Vectors:
        generator = np.random.default_rng([2, seed])
        return self._sample_near_centers(generator, count, 0.0, 0.9)

    def sentence_vectors(self, count: int, seed: int) -> Vectors:
        return self._sample_near_centers(np.random.default_rng([3, seed]), count, 0.5, 1.0)

    def _sample_near_centers(self, generator: np.random.Generator, count: int, shift: float, noise: float) -> Vectors:
        direction = _normalize(np.random.default_rng(4).normal(size=(1, SIZE)))
        centers = self.centers[generator.integers(CLUSTERS, size=count)]
        scatter = generator.normal(size=(count, SIZE), scale=noise / SIZE**0.5)
        return _normalize(centers + shift * direction + scatter)

    def all_vectors(self) -> Vectors:
        """Returns all vectors in the order of the index, `[rows, SIZE] float32`."""
        return np.concatenate([self.image_vectors(self.rows // SHARDS, shard) for shard in range(SHARDS)])

    def sample_queries(self, count: int, words: int, seed: int) -> list[str]:
        """Samples queries of `words` words each, with the word frequencies of the captions."""
        return sample_captions(np.random.default_rng([5, seed]), np.full(count, words))


def prepare_data(rows: int) -> tuple[SearchData, dict[str, float]]:
    """Returns the data, and the seconds and peak megabytes of building the index, which happens only once."""
    data = SearchData(Path(".bench") / f"search-{rows}", rows)
    build_file = data.folder / "built.json"
    if not build_file.exists():
        shutil.rmtree(data.folder, ignore_errors=True)
        for step in ("write", "build"):
            command = [sys.executable, "-m", __spec__.name, step, str(rows)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        build_file.write_text(printed.splitlines()[-1], encoding="utf-8")
    built: dict[str, float] = json.loads(build_file.read_text(encoding="utf-8"))
    return data, built


def _write(data: SearchData) -> None:
    rows = data.rows // SHARDS

    def list_images(shard: int) -> dict[str, list[str]]:
        ids = [f"{shard:02d}-{number:06d}" for number in range(rows)]
        return {"image_id": ids, "uri": [f"https://example.org/{image_id}.jpg" for image_id in ids]}

    def make_captions(shard: int) -> pa.RecordBatch:
        generator = np.random.default_rng([6, shard])
        captions = sample_captions(generator, generator.integers(7, 14, size=rows))
        described = describe_captions(captions, -generator.gamma(4, 3, size=rows).astype(np.float32))
        splits = np.where(generator.random(rows) < 0.05, "val", "train").tolist()
        return pa.RecordBatch.from_pydict({**list_images(shard), "split": splits, **described})

    def make_embeddings(shard: int) -> pa.RecordBatch:
        vectors = numpy_to_vectors(data.image_vectors(rows, shard).astype(np.float16))
        return pa.RecordBatch.from_pydict({**list_images(shard), "embedding": vectors})

    config = {"source": "synthetic"}
    write_dataset(data.captions, "captions", captions_schema(), SHARDS, make_captions, config)
    config = {"source": "synthetic", "ranker": "none"}
    write_dataset(data.folder / "embeddings", "embeddings", embeddings_schema(SIZE), SHARDS, make_embeddings, config)


def sample_captions(generator: np.random.Generator, lengths: npt.NDArray[np.int64]) -> list[str]:
    """Samples captions with these numbers of words by Zipf's law."""
    ranks = (len(WORDS) ** generator.random(int(lengths.sum()))).astype(int) - 1
    words = np.array(WORDS)[ranks].tolist()
    ends = np.cumsum(lengths).tolist()
    return [" ".join(words[end - length : end]) for end, length in zip(ends, lengths.tolist(), strict=True)]


def describe_captions(captions: list[str], log_probs: npt.NDArray[np.floating]) -> dict[str, pa.Array]:
    """Returns the columns of a captions dataset that describe the captions, which are the only candidates."""
    candidates = [
        [{"caption": caption, "log_prob": log_prob}] for caption, log_prob in zip(captions, log_probs, strict=True)
    ]
    columns = {
        "caption": captions,
        "log_prob": log_probs,
        "tokens": [caption.count(" ") + 2 for caption in captions],
        "candidates": candidates,
    }
    return {name: pa.array(values, captions_schema().field(name).type) for name, values in columns.items()}


def _normalize(vectors: npt.NDArray[np.floating]) -> Vectors:
    unit: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def main() -> None:
    """Writes the datasets, or builds the index and prints the seconds and peak megabytes."""
    step, rows = sys.argv[1], int(sys.argv[2])
    data = SearchData(Path(".bench") / f"search-{rows}", rows)
    if step == "write":
        _write(data)
        return
    began = time.monotonic()
    build_index(
        data.captions, data.index, IndexConfig(), embeddings=data.folder / "embeddings", run=RunConfig(progress=False)
    )
    print(json.dumps({"seconds": time.monotonic() - began, "megabytes": read_peak_megabytes()}))


if __name__ == "__main__":
    main()
