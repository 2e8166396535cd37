"""Training batches of images with their sentences, streamed from `features/` in a seeded order and bounded memory.

Shards are visited in a new order each epoch. A window of them is read at a time, in the background, and its images are
mixed; so memory holds two windows, however large the dataset. A dataset that fits into one window is read once.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.arrays import vectors_to_numpy
from captionlib.data.batches.augmentation import FeatureMapAugmentation
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.errors import DatasetError

__all__ = [
    "CaptionBatch",
    "CaptionBatches",
    "feature_shape",
    "mean_and_std",
    "pool_map",
    "read_captions",
    "read_features",
    "read_references",
    "sample_features",
]


@dataclass(frozen=True)
class CaptionBatch:
    """Some images with their sentences, or with some of them.

    Attributes:
        features: `[images, size] float32`, or `[images, positions, channels]`; or the images themselves, where the
            encoder is part of what is trained: `[images, crop_size, crop_size, 3] uint8`.
        sentences: the token ids of each sentence, without START and END.
        image_of_sentence: `[sentences] int64`, which row of `features` a sentence describes.
    """

    features: npt.NDArray[np.float32] | npt.NDArray[np.uint8]
    sentences: list[list[int]]
    image_of_sentence: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Window:
    """The images of some shards that belong to a split and have sentences."""

    features: npt.NDArray[np.floating]
    sentences: list[list[list[int]]]

    def pairs(self) -> npt.NDArray[np.int64]:
        """Every sentence, `[sentences, 2] int64`: its image, and its number among those of the image."""
        counts = np.array([len(row) for row in self.sentences], np.int64)
        first = np.repeat(counts.cumsum() - counts, counts)
        return np.stack([np.repeat(np.arange(len(counts)), counts), np.arange(len(first)) - first], 1)


class CaptionBatches:
    """The batches of one split; the same seed and epoch give the same batches, from any batch on.

    Args:
        dataset: `features/`, complete.
        splits: which rows; `restval` usually belongs to training too.
        encode: a sentence to its token ids.
        images: how many images a batch has, each with all of its sentences; the last of a window may have fewer.
        window_bytes: how much of the features is mixed at a time.
        pooled: whether to give the mean over the positions of spatial maps in their place.
        sentences: how many sentences a batch has where each is mixed by itself; None mixes images.
        views: how square maps are shown while mixing; None shows them as they are.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        splits: Sequence[str],
        encode: Callable[[str], list[int]],
        images: int,
        window_bytes: int = 512 << 20,
        pooled: bool = False,
        sentences: int | None = None,
        views: FeatureMapAugmentation | None = None,
    ) -> None:
        self._dataset = dataset
        self._splits = frozenset(splits)
        self._encode = encode
        self._images = images
        self._sentences = sentences
        self._pooled = pooled
        self._views = views or FeatureMapAugmentation()
        self._keeps_maps = bool(self._views) or not pooled
        self._windows = _group_shards(dataset, window_bytes, not self._keeps_maps)
        self._load_once = lru_cache(maxsize=1)(self._load)

    def count(self, processes: int = 1) -> int:
        """About how many batches an epoch has, when so many processes share them."""
        columns = ["split"] if self._sentences is None else ["split", "captions"]
        things = 0
        for shard in range(self._dataset.shards):
            rows = self._dataset.read(shard, columns)
            rows = rows.filter(pc.is_in(rows["split"], pa.array(sorted(self._splits), pa.string())))
            counts = None if self._sentences is None else pc.list_value_length(rows["captions"])
            things += len(rows) if counts is None else pc.sum(counts).as_py() or 0
        return -(-things // ((self._sentences or self._images) * processes))

    def epoch(self, seed: int, epoch: int) -> Iterator[CaptionBatch]:
        """All images once, or all sentences, mixed by `seed` and `epoch`."""
        for batch in self.shares(seed, epoch, 0, 1):
            if batch is not None:
                yield batch

    def shares(
        self, seed: int, epoch: int, process: int, processes: int, first: int = 0
    ) -> Iterator[CaptionBatch | None]:
        """The shares of one process in an epoch of batches that are as many times as large as there are processes.

        Each process has as many as the others, up to an image; None where a batch has fewer images than processes.
        They begin with the batch `first`.
        """
        size = (self._sentences or self._images) * processes
        pieces = (
            (number, window, order[begin : begin + size])
            for number, (window, order) in enumerate(self._mixed(seed, epoch))
            for begin in range(0, len(order), size)
        )
        with ThreadPoolExecutor(1, thread_name_prefix="batch") as pool:
            # A batch is made while the one before is learned from.
            coming: Future[CaptionBatch | None] | None = None
            for number, window, chosen in islice(pieces, first, None):
                seed_of_views = [seed, epoch, number, *chosen[0].flat]
                following = pool.submit(self._share, window, chosen, process, processes, seed_of_views)
                if coming is not None:
                    yield coming.result()
                coming = following
            if coming is not None:
                yield coming.result()

    def _share(
        self, window: _Window, chosen: npt.NDArray[np.int64], process: int, processes: int, seed_of_views: list[int]
    ) -> CaptionBatch | None:
        """The part of a batch that is a process's, None where that is nothing."""
        part = np.array_split(np.arange(len(chosen)), processes)[process]
        if not len(part):
            return None
        if not self._views:
            return self._batch(window, chosen[part])
        draw = np.random.default_rng(seed_of_views)
        size, draws = draw.random(), draw.random((len(chosen), 3))
        return self._batch(window, chosen[part], (size, draws[part]))

    def _mixed(self, seed: int, epoch: int) -> Iterator[tuple[_Window, npt.NDArray[np.int64]]]:
        """The windows of an epoch, each with its images in a new order, or with its pairs."""
        draw = np.random.default_rng([seed, epoch])
        shards = draw.permutation(self._dataset.shards)
        starts = np.cumsum([0, *(len(window) for window in self._windows)])
        groups = [tuple(sorted(shards[begin:end])) for begin, end in pairwise(starts)]
        for window in self._prefetched(groups):
            yield window, draw.permutation(len(window.sentences) if self._sentences is None else window.pairs())

    def in_order(self) -> Iterator[CaptionBatch]:
        """All images once, as they stand in the dataset."""
        for window in self._prefetched(self._windows):
            for begin in range(0, len(window.sentences), self._images):
                yield self._batch(window, np.arange(begin, min(begin + self._images, len(window.sentences))))

    def _prefetched(self, groups: Sequence[tuple[int, ...]]) -> Iterator[_Window]:
        load = self._load_once if len(groups) == 1 else self._load
        with ThreadPoolExecutor(1, thread_name_prefix="window") as pool:
            coming = pool.submit(load, groups[0])
            for following in [*groups[1:], None]:
                window = coming.result()
                if following is not None:
                    coming = pool.submit(load, following)
                yield window

    def _load(self, shards: tuple[int, ...]) -> _Window:
        features: list[npt.NDArray[np.floating]] = []
        sentences: list[list[list[int]]] = []
        for shard in shards:
            for rows, captions in read_features(self._dataset, shard, self._splits):
                encoded = [[ids for caption in row if (ids := self._encode(caption))] for row in captions]
                kept = [number for number, row in enumerate(encoded) if row]
                features.append(rows[kept] if self._keeps_maps else pool_map(rows[kept]))
                sentences.extend(encoded[number] for number in kept)
        shape = feature_shape(self._dataset) if self._keeps_maps else feature_shape(self._dataset)[-1:]
        return _Window(np.concatenate(features) if features else np.empty((0, *shape), np.float32), sentences)

    def _batch(
        self,
        window: _Window,
        chosen: npt.NDArray[np.int64],
        drawn: tuple[float, npt.NDArray[np.float64]] | None = None,
    ) -> CaptionBatch:
        """A batch of images, `[images]`, or of pairs, `[sentences, 2]`, with what was drawn for their views."""
        if chosen.ndim == 1:
            images, first = chosen, np.arange(len(chosen))
            sentences = [sentence for image in chosen for sentence in window.sentences[image]]
            image_of_sentence = np.repeat(first, [len(window.sentences[image]) for image in chosen])
        else:
            images, first, image_of_sentence = np.unique(chosen[:, 0], return_index=True, return_inverse=True)
            sentences = [window.sentences[image][number] for image, number in chosen.tolist()]
        if drawn is None:
            shown = window.features[images]
        else:
            size, draws = drawn
            shown = self._views.show(window.features, images, size, draws[first])
        features = (pool_map(shown) if self._pooled else shown).astype(np.float32)
        return CaptionBatch(features, sentences, image_of_sentence)


def feature_shape(dataset: ShardedDataset) -> list[int]:
    """`[size]`, or `[positions, channels]`, of one image's features."""
    shape: list[int] = dataset.config["encoder"]["shape"]
    return shape


def pool_map(features: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """The mean over positions, `[images, channels]`, of `[images, positions, channels]`; vectors stay as they are."""
    return features.mean(1, dtype=np.float32) if features.ndim == 3 else features


def read_features(
    dataset: ShardedDataset, shard: int, splits: frozenset[str]
) -> Iterator[tuple[npt.NDArray[np.floating], list[list[str]]]]:
    """The features `[rows, *shape]` and the captions of a shard's rows of these splits, in pieces."""
    shape = feature_shape(dataset)
    for rows in dataset.read_batches(shard, ["split", "captions", "features"]):
        kept = np.array([split in splits for split in rows["split"].to_pylist()], bool)
        if kept.any():
            features = vectors_to_numpy(rows["features"], shape)
            captions = rows["captions"].to_pylist()
            yield (
                features[kept],
                [row for row, keep in zip(captions, kept, strict=True) if keep],
            )


def read_captions(dataset: ShardedDataset, splits: Sequence[str]) -> Iterator[str]:
    """The sentences of these splits; the features stay unread.

    Raises:
        DatasetError: none of the splits' images has a sentence.
    """
    seen: set[str] = set()
    found = False
    for shard in range(dataset.shards):
        for rows in dataset.read_batches(shard, ["split", "captions"]):
            for split, captions in zip(rows["split"].to_pylist(), rows["captions"].to_pylist(), strict=True):
                seen.add(split)
                if split in splits:
                    found = found or bool(captions)
                    yield from captions
    if not found:
        raise DatasetError(
            f"{dataset.folder.uri}: expected sentences in split {' or '.join(splits)}, got none; "
            f"its splits are {', '.join(sorted(seen)) or 'none'}"
        )


def read_references(dataset: ShardedDataset, splits: Sequence[str]) -> Iterator[list[str]]:
    """The sentences of each image of these splits that has any; the features stay unread."""
    for shard in range(dataset.shards):
        for rows in dataset.read_batches(shard, ["split", "captions"]):
            for split, captions in zip(rows["split"].to_pylist(), rows["captions"].to_pylist(), strict=True):
                if split in splits and captions:
                    yield captions


def sample_features(dataset: ShardedDataset, splits: Sequence[str], count: int) -> npt.NDArray[np.float32]:
    """The features of about `count` images of these splits, `[images, *shape]`, as many of each shard."""
    share = -(-count // max(1, dataset.shards))
    taken: list[npt.NDArray[np.floating]] = []
    for shard in range(dataset.shards):
        left = share
        for rows, _ in read_features(dataset, shard, frozenset(splits)):
            taken.append(rows[:left])
            left -= len(taken[-1])
            if not left:
                break
    return np.concatenate(taken).astype(np.float32)


def mean_and_std(
    dataset: ShardedDataset,
    splits: Sequence[str],
    vectors: Callable[[npt.NDArray[np.floating]], npt.NDArray[np.floating]] = pool_map,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean and standard deviation of each number of the image vectors of these splits, in one pass.

    Args:
        dataset: `features/`, complete.
        splits: which rows.
        vectors: from features, `[images, *shape]`, to vectors, `[images, size]`.

    Returns:
        `[size]` each.
    """
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for shard in range(dataset.shards):
        for rows, _ in read_features(dataset, shard, frozenset(splits)):
            numbers = vectors(rows).astype(np.float64)
            count += len(numbers)
            total = total + numbers.sum(0)
            squares = squares + np.square(numbers).sum(0)
    mean = total / max(count, 1)
    std = np.sqrt(np.maximum(squares / max(count, 1) - np.square(mean), 0))
    return mean.astype(np.float32), std.astype(np.float32)


def _group_shards(dataset: ShardedDataset, window_bytes: int, pooled: bool) -> list[tuple[int, ...]]:
    """Runs of shards that fill a window each; every shard counts as much as the largest, in memory."""
    largest = max((marker.rows for marker in dataset.read_markers().values()), default=1)
    width = dataset.schema.field("features").type.value_type.bit_width // 8
    row_bytes = 4 * feature_shape(dataset)[-1] if pooled else width * int(np.prod(feature_shape(dataset)))
    together = max(1, window_bytes // max(1, largest * row_bytes))
    return [tuple(range(first, min(first + together, dataset.shards))) for first in range(0, dataset.shards, together)]
