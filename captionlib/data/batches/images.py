"""Training batches of images themselves with their sentences, loaded ahead in a seeded order.

Which rows a batch has is fixed by seed and epoch alone. An image that cannot be had is missing from its batch and moves
no other; so a run goes on from any batch without loading what came before it.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.batches.captions import CaptionBatch, read_captions
from captionlib.data.batches.skipped import SkippedImages
from captionlib.data.images.loading import LoadImages
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.errors import ImageError

__all__ = ["ImageBatches", "read_rows"]

Row = dict[str, Any]
Pixels = npt.NDArray[np.uint8]


class ImageBatches:
    """The batches of one split; the same seed and epoch give the same batches, from any batch on.

    Args:
        rows: of the manifest, see `read_rows`.
        encode: a sentence to its token ids.
        images: how many images a batch has.
        load: loads images, see `open_loader`.
        skipped: takes those that cannot be had.
        horizontal_flip: mirror every other image while training, drawn anew in each epoch.
    """

    def __init__(
        self,
        rows: pa.Table,
        encode: Callable[[str], list[int]],
        images: int,
        load: LoadImages,
        skipped: SkippedImages,
        horizontal_flip: bool = False,
    ) -> None:
        self._rows = rows
        self._encode = encode
        self._images = images
        self._load = load
        self._skipped = skipped
        self._horizontal_flip = horizontal_flip

    def count(self, processes: int = 1) -> int:
        """How many batches an epoch has, when so many processes share them."""
        return -(-len(self._rows) // (self._images * processes))

    def shares(
        self, seed: int, epoch: int, process: int, processes: int, first: int = 0
    ) -> Iterator[CaptionBatch | None]:
        """The shares of one process in an epoch of batches that are as many times as large as there are processes.

        They begin with the batch `first`. None where nothing of a batch can be learnt from: it has fewer images than
        processes, or none of them could be had.
        """
        draw = np.random.default_rng([seed, epoch])
        order = draw.permutation(len(self._rows))
        mirrored = draw.random(len(self._rows)) < (0.5 if self._horizontal_flip else 0.0)
        size = self._images * processes
        begins = range(first * size, len(order), size)
        parts = [np.array_split(order[begin : begin + size], processes)[process] for begin in begins]
        for had in self._loaded(parts):
            yield self._batch([(row, image[:, ::-1] if mirrored[number] else image) for number, row, image in had])

    def in_order(self) -> Iterator[CaptionBatch]:
        """All images once, as they stand in the manifest."""
        for had in self._in_order():
            batch = self._batch(had)
            if batch is not None:
                yield batch

    def images_in_order(self) -> Iterator[tuple[list[Row], Pixels]]:
        """The same images with their rows, `[images, crop_size, crop_size, 3]`."""
        for had in self._in_order():
            if had:
                yield [row for row, _ in had], np.stack([image for _, image in had])

    def _in_order(self) -> Iterator[list[tuple[Row, Pixels]]]:
        numbers = np.arange(len(self._rows))
        for had in self._loaded([numbers[begin : begin + self._images] for begin in numbers[:: self._images]]):
            yield [(row, image) for _, row, image in had]

    def _loaded(self, parts: Sequence[npt.NDArray[np.int64]]) -> Iterator[list[tuple[int, Row, Pixels]]]:
        """Of each part the images that could be had, with their numbers and rows."""
        loaded = self._load(row for part in parts for row in self._rows.take(pa.array(part)).to_pylist())
        for part in parts:
            had = []
            for number, (row, image) in zip(part, islice(loaded, len(part)), strict=True):
                if isinstance(image, ImageError):
                    self._skipped.add(row, image)
                else:
                    had.append((int(number), row, image))
            yield had

    def _batch(self, had: Sequence[tuple[Row, Pixels]]) -> CaptionBatch | None:
        sentences = [[ids for caption in row["captions"] if (ids := self._encode(caption))] for row, _ in had]
        if not any(sentences):
            return None
        return CaptionBatch(
            features=np.stack([image for _, image in had]),
            sentences=[sentence for some in sentences for sentence in some],
            image_of_sentence=np.repeat(np.arange(len(had)), [len(some) for some in sentences]),
        )


def read_rows(dataset: ShardedDataset, splits: Sequence[str]) -> pa.Table:
    """The rows of a manifest of these splits that have sentences: image_id, uri, captions.

    They are held in memory, without the images: about half a kilobyte each.

    Raises:
        DatasetError: there are none.
    """
    next(read_captions(dataset, splits))
    pieces = []
    for shard in range(dataset.shards):
        rows = dataset.read(shard, ["image_id", "uri", "split", "captions"])
        wanted = pc.is_in(rows["split"], value_set=pa.array(list(splits), pa.string()))
        spoken = pc.greater(pc.list_value_length(rows["captions"]), 0)
        pieces.append(rows.filter(pc.and_(wanted, spoken)).drop_columns(["split"]))
    return pa.concat_tables(pieces).combine_chunks()
