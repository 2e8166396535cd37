"""Generates an index of synthetic captions with thumbnails for the benchmarks of pages, once; keeps it in `.bench/`.

The rows share a few hundred image files, of which the thumbnails are made ahead. The captions have the word frequencies
of `benchmarks.search_data`.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.search_data import describe_captions, sample_captions
from benchmarks.synthetic_datasets import write_dataset
from captionlib.data.shards.schemas import captions_schema
from captionlib.search.build import plan_build
from captionlib.search.config import IndexConfig
from captionlib.serving.config import ServingConfig
from captionlib.serving.thumbnails import create_thumbnails

__all__ = ["PageData", "prepare_page_data"]

IMAGES = 256
SHARDS = 4
YEAR_SECONDS = 31_536_000
FIRST_MODIFIED = 1_420_000_000  # in 2014


@dataclass(frozen=True)
class PageData:
    """The folders of the data."""

    folder: Path

    @property
    def index(self) -> Path:
        return self.folder / "index"

    @property
    def thumbnails(self) -> Path:
        return self.folder / "thumbnails"


def prepare_page_data(rows: int) -> PageData:
    """Returns the data; a separate process generates it if it does not exist."""
    data = PageData((Path(".bench") / f"pages-{rows}").absolute())
    if not (data.index / "index.json").exists():
        shutil.rmtree(data.folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", __spec__.name, str(rows)], check=True)
    return data


def _write(data: PageData, rows: int) -> None:
    sizes = _write_images(data.folder / "images")
    uris = [str(data.folder / "images" / f"{number}.jpg") for number in range(IMAGES)]
    create_thumbnails(data.thumbnails, uris, ServingConfig())
    per_shard = rows // SHARDS

    def make_rows(shard: int) -> pa.RecordBatch:
        generator = np.random.default_rng([1, shard])
        images = np.arange(per_shard) % IMAGES
        # The files of a shard were modified in the course of two years.
        modified = FIRST_MODIFIED + YEAR_SECONDS * 2 * (shard + generator.random(per_shard))
        texts = sample_captions(generator, generator.integers(7, 14, size=per_shard))
        log_probs = -generator.gamma(4, 3, size=per_shard).astype(np.float32)
        columns = {
            "image_id": [f"{shard:02d}-{number:06d}" for number in range(per_shard)],
            "uri": [uris[image] for image in images],
            "version": [f"{40_000:x}-{int(seconds * 10**9):x}" for seconds in modified],
            "split": np.where(generator.random(per_shard) < 0.05, "val", "train").tolist(),
            "width": [sizes[image][0] for image in images],
            "height": [sizes[image][1] for image in images],
            "content_hash": [None] * per_shard,
            **describe_captions(texts, log_probs),
        }
        return pa.RecordBatch.from_pydict(columns, captions_schema())

    config = {"source": "synthetic"}
    write_dataset(data.folder / "captions", "captions", captions_schema(), SHARDS, make_rows, config)


def _write_images(folder: Path) -> list[tuple[int, int]]:
    """Writes JPEG files of smooth color gradients. Returns their widths and heights."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(2)
    sizes = []
    for number in range(IMAGES):
        width, height = (int(side) for side in generator.integers(300, 600, size=2))
        coarse = Image.fromarray(generator.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BILINEAR).save(folder / f"{number}.jpg", quality=85)
        sizes.append((width, height))
    return sizes


def main() -> None:
    rows = int(sys.argv[1])
    data = PageData((Path(".bench") / f"pages-{rows}").absolute())
    _write(data, rows)
    build = plan_build(data.folder / "captions", None, data.index, IndexConfig())
    for position in build.added:
        build.add_shard(position)
    build.finish()


if __name__ == "__main__":
    main()
