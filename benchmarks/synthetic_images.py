"""Writes random images and manifests of them."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from benchmarks.synthetic_datasets import write_dataset
from captionlib.data.images.decoding import Preprocessing
from captionlib.data.images.loading import LoadingConfig, open_loader
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA

__all__ = ["decode_images", "write_images", "write_manifest"]


def write_images(folder: Path, count: int, size: int = 224, seed: int = 0) -> list[Path]:
    """Writes JPEG files of smooth color gradients, about as large as a camera's images of the same size."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        path = folder / f"{number:06d}.jpg"
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(path)
    return paths


def decode_images(paths: list[Path], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Decodes images to the input of an encoder, `[images, crop_size, crop_size, 3] uint8`."""
    with open_loader(LoadingConfig(), preprocessing) as load:
        loaded = [image for _, image in load({"uri": str(path)} for path in paths)]
    return np.stack([image.pixels for image in loaded if not isinstance(image, Exception)])


def write_manifest(folder: Path, uris: list[str], shard_size: int) -> ShardedDataset:
    """Writes a manifest with one row per URI. An image may occur several times, with a different id each time."""

    def make_rows(shard: int) -> pa.RecordBatch:
        start = shard * shard_size
        rows = [
            {"image_id": f"{start + offset:08d}", "uri": uri, "split": "train", "captions": ["a color gradient"]}
            for offset, uri in enumerate(uris[start : start + shard_size])
        ]
        return pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA)

    shards = -(-len(uris) // shard_size)
    return write_dataset(folder, "manifest", MANIFEST_SCHEMA, shards, make_rows, {"images": len(uris)})
