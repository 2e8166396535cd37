"""Writes random images and manifests of them."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from captionlib.data.images.decoding import Preprocessing
from captionlib.data.images.loading import LoadingConfig, open_loader
from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard

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
    starts = range(0, len(uris), shard_size)
    dataset = create_dataset(folder, "manifest", MANIFEST_SCHEMA, config={"images": len(uris)}, shards=len(starts))
    for shard, start in enumerate(starts):
        rows = [
            {"image_id": f"{start + offset:08d}", "uri": uri, "split": "train", "captions": ["a color gradient"]}
            for offset, uri in enumerate(uris[start : start + shard_size])
        ]
        with write_shard(dataset, shard, len(rows)) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))
    dataset.finish()
    return dataset
