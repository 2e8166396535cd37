"""Loads training batches of decoded images and captions in the background, in a random order.

The rows of a batch depend only on the seed and the epoch. An unreadable image is dropped from its batch, and other
batches do not change. Therefore a run can resume at any batch without loading earlier images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.batches.captions import CaptionBatch, make_batch, read_captions
from captionlib.data.batches.skipped import SkippedImages
from captionlib.data.images.loading import LoadImages
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.splits import add_split_aliases
from captionlib.errors import ImageError

__all__ = ["ImageBatches", "read_captioned_rows"]

Row = dict[str, Any]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImageBatches:
    """Batches of captioned images from a manifest (a dataset with one row per image: id, uri, split and captions)."""

    rows: pa.Table  # from `read_captioned_rows`
    encode: Callable[[str], list[int]]  # converts a caption to token ids
    batch_images: int
    load: LoadImages
    skipped: SkippedImages
    horizontal_flip: bool = False  # flip each image with probability 0.5 in shuffled batches

    def count(self, world_size: int = 1) -> int:
        """Returns the number of batches per epoch."""
        return -(-len(self.rows) // (self.batch_images * world_size))

    def shuffled(
        self, seed: int, epoch: int, rank: int = 0, world_size: int = 1, first_batch: int = 0
    ) -> Iterator[CaptionBatch | None]:
        """Yields the batches of an epoch in random order; see `CaptionBatches.shuffled` for the arguments.

        Yields None for a batch if the process has no images of it, or if none of them can be read.
        """
        generator = np.random.default_rng([seed, epoch])
        order = generator.permutation(len(self.rows))
        is_flipped = generator.random(len(self.rows)) < (0.5 if self.horizontal_flip else 0)
        size = self.batch_images * world_size
        batches = (order[begin : begin + size] for begin in range(first_batch * size, len(order), size))
        parts = [np.array_split(batch, world_size)[rank] for batch in batches]
        for loaded in self._load_parts(parts):
            yield self._batch([(row, image[:, ::-1] if is_flipped[index] else image) for index, row, image in loaded])

    def in_order(self) -> Iterator[CaptionBatch]:
        """Yields batches of all readable images with their captions, in the order of the manifest."""
        for loaded in self._load_in_order():
            if (batch := self._batch([(row, image) for _, row, image in loaded])) is not None:
                yield batch

    def images_in_order(self) -> Iterator[tuple[Sequence[int], Pixels]]:
        """Yields the indices in `rows` and the pixels of batches of readable images, in the order of the manifest."""
        for loaded in self._load_in_order():
            if loaded:
                yield [index for index, _, _ in loaded], np.stack([image for _, _, image in loaded])

    def _load_in_order(self) -> Iterator[list[tuple[int, Row, Pixels]]]:
        size, indices = self.batch_images, np.arange(len(self.rows))
        return self._load_parts([indices[begin : begin + size] for begin in indices[::size]])

    def _load_parts(self, parts: Sequence[npt.NDArray[np.int64]]) -> Iterator[list[tuple[int, Row, Pixels]]]:
        """Yields the readable images of each part as (index in `rows`, row, pixels)."""
        results = self.load(row for part in parts for row in self.rows.take(pa.array(part)).to_pylist())
        for part in parts:
            loaded = []
            for index, (row, image) in zip(part, islice(results, len(part)), strict=True):
                if isinstance(image, ImageError):
                    self.skipped.add(row, image)
                else:
                    loaded.append((int(index), row, image.pixels))
            yield loaded

    def _batch(self, images: Sequence[tuple[Row, Pixels]]) -> CaptionBatch | None:
        sentences = [[ids for caption in row["captions"] if (ids := self.encode(caption))] for row, _ in images]
        return make_batch(np.stack([image for _, image in images]), sentences) if any(sentences) else None


def read_captioned_rows(dataset: ShardedDataset, splits: Sequence[str]) -> pa.Table:
    """Returns the columns image_id, uri and captions of the captioned images in `splits`, about 500 bytes per row.

    Raises:
        DatasetError: no image in `splits` has a caption.
    """
    next(read_captions(dataset, splits))  # raises an error if there is no caption
    tables = []
    for shard in range(dataset.shards):
        rows = dataset.read(shard, ["image_id", "uri", "split", "captions"])
        in_splits = pc.is_in(rows["split"], value_set=pa.array(add_split_aliases(splits), pa.string()))
        captioned = pc.greater(pc.list_value_length(rows["captions"]), 0)
        tables.append(rows.filter(pc.and_(in_splits, captioned)).drop_columns(["split"]))
    return pa.concat_tables(tables).combine_chunks()
