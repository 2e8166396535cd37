"""Streams training batches from a features dataset (Parquet shards of image features and captions).

Each epoch reads the shards in a new random order. A buffer holds a group of shards, and its images are shuffled. The
next buffer is loaded in the background. A dataset that fits in one buffer is read only once.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice, pairwise
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from captionlib.data.arrays import vectors_to_numpy
from captionlib.data.batches.augmentation import FeatureMapAugmentation
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.splits import add_split_aliases
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import DatasetError

__all__ = [
    "CaptionBatch",
    "CaptionBatches",
    "average_positions",
    "compute_mean_and_std",
    "count_training_data",
    "get_feature_shape",
    "make_batch",
    "make_caption_tokenizer",
    "read_captions",
    "read_features",
    "read_references",
    "sample_features",
]

_DEFAULT_MAX_WORDS = 30
_DEFAULT_MAX_CHARACTERS = 200

Result = TypeVar("Result")
Features = npt.NDArray[np.floating]
EncodeCaption = Callable[[str], list[int]]


@dataclass(frozen=True)
class CaptionBatch:
    """Images with their captions.

    The features are `[images, size] float32` or `[images, positions, channels] float32`, or pixels if the image encoder
    is trained too: `[images, crop_size, crop_size, 3] uint8`.
    """

    features: npt.NDArray[np.float32] | npt.NDArray[np.uint8]
    sentences: list[list[int]]  # token ids of each caption, without END
    image_of_caption: npt.NDArray[np.int64]  # index in `features` of the image of each caption


class _Buffer(NamedTuple):
    features: Features
    sentences: list[list[list[int]]]  # the token ids of each caption of each image


@dataclass
class CaptionBatches:
    """Batches of some splits of a complete features dataset. The same seed and epoch give the same batches."""

    dataset: ShardedDataset
    splits: Sequence[str]
    encode: EncodeCaption
    batch_images: int  # each with all its captions; the last batch of a buffer may have fewer
    buffer_bytes: int = 512 << 20  # of a shuffle buffer, which holds at least one shard; two are in memory
    pooled: bool = False  # average feature maps over their positions
    augmentation: FeatureMapAugmentation = field(default_factory=FeatureMapAugmentation)  # of shuffled batches

    def __post_init__(self) -> None:
        self._pools_on_load = self.pooled and not self.augmentation  # augmentation needs unpooled maps
        self._groups = _group_shards(self.dataset, self.buffer_bytes, self._pools_on_load)
        self._load_once = lru_cache(maxsize=1)(self._load)

    def count(self, world_size: int = 1) -> int:
        """Returns the number of batches per epoch. The order of the shards may change the number slightly."""
        size = self.batch_images * world_size
        images = [
            sum(1 for _ in _read_references_of_shard(self.dataset, shard, self.splits))
            for shard in range(self.dataset.shards)
        ]
        return sum(-(-sum(images[shard] for shard in group) // size) for group in self._groups)

    def shuffled(
        self, seed: int, epoch: int, rank: int = 0, world_size: int = 1, first_batch: int = 0
    ) -> Iterator[CaptionBatch | None]:
        """Yields the batches of an epoch in random order, starting at `first_batch`. Each image occurs once per epoch.

        Batches of `batch_images * world_size` images are divided evenly among `world_size` processes. Yields the parts
        for the process `rank`, or None for a part without images.
        """
        size = self.batch_images * world_size
        selections = (
            (index, buffer, order[begin : begin + size])
            for index, (buffer, order) in enumerate(self._shuffled_buffers(seed, epoch))
            for begin in range(0, len(order), size)
        )
        return _call_ahead(
            partial(
                self._augmented_batch,
                *(buffer, images, np.array_split(np.arange(len(images)), world_size)[rank]),
                seed=[seed, epoch, index, images[0]],
            )
            for index, buffer, images in islice(selections, first_batch, None)
        )

    def in_order(self) -> Iterator[CaptionBatch]:
        """Yields batches of all images with their captions, in the order of the dataset."""
        for buffer in self._prefetch(self._groups):
            for begin in range(0, len(buffer.sentences), self.batch_images):
                images = np.arange(begin, min(begin + self.batch_images, len(buffer.sentences)))
                yield self._batch(buffer, images, buffer.features[images])

    def images_in_order(self) -> Iterator[tuple[Sequence[int], npt.NDArray[np.float32] | npt.NDArray[np.uint8]]]:
        """Yields the features of the images of each batch of `in_order`, and indices that continue across batches."""
        first = 0
        for batch in self.in_order():
            yield range(first, first + len(batch.features)), batch.features
            first += len(batch.features)

    def _shuffled_buffers(self, seed: int, epoch: int) -> Iterator[tuple[_Buffer, npt.NDArray[np.int64]]]:
        generator = np.random.default_rng([seed, epoch])
        shards = generator.permutation(self.dataset.shards)
        starts = np.cumsum([0, *(len(group) for group in self._groups)])
        groups = [tuple(sorted(shards[begin:end])) for begin, end in pairwise(starts)]
        for buffer in self._prefetch(groups):
            yield buffer, generator.permutation(len(buffer.sentences))

    def _prefetch(self, groups: Sequence[tuple[int, ...]]) -> Iterator[_Buffer]:
        load = self._load_once if len(groups) == 1 else self._load
        return _call_ahead(partial(load, group) for group in groups)

    def _load(self, shards: tuple[int, ...]) -> _Buffer:
        features: list[Features] = []
        sentences: list[list[list[int]]] = []
        for shard in shards:
            for rows, captions in read_features(self.dataset, shard, self.splits):
                encoded = [[ids for caption in row if (ids := self.encode(caption))] for row in captions]
                captioned = [index for index, row in enumerate(encoded) if row]
                features.append(average_positions(rows[captioned]) if self._pools_on_load else rows[captioned])
                sentences.extend(encoded[index] for index in captioned)
        shape = get_feature_shape(self.dataset)[-1 if self._pools_on_load else 0 :]
        return _Buffer(np.concatenate(features) if features else np.empty((0, *shape), np.float32), sentences)

    def _augmented_batch(
        self, buffer: _Buffer, images: npt.NDArray[np.int64], part: npt.NDArray[np.int64], seed: list[int]
    ) -> CaptionBatch | None:
        if not len(part):
            return None
        if not self.augmentation:
            return self._batch(buffer, images[part], buffer.features[images[part]])
        generator = np.random.default_rng(seed)
        # Random numbers for the whole batch, so the augmentation does not depend on the number of processes.
        crop_uniform, uniforms = generator.random(), generator.random((len(images), 3))
        maps = self.augmentation.apply(buffer.features, images[part], crop_uniform, uniforms[part])
        return self._batch(buffer, images[part], maps)

    def _batch(self, buffer: _Buffer, images: npt.NDArray[np.int64], features: Features) -> CaptionBatch:
        inputs = average_positions(features) if self.pooled else features
        return make_batch(inputs.astype(np.float32), [buffer.sentences[image] for image in images])


def _call_ahead(calls: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Yields the result of each call. The next call runs in a thread while the consumer processes a result."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        pending: Future[Result] | None = None
        for call in calls:
            following = pool.submit(call)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def make_batch(
    features: npt.NDArray[np.float32] | npt.NDArray[np.uint8], sentences: Sequence[list[list[int]]]
) -> CaptionBatch:
    """Returns a batch of images with `features`, or pixels, and with the token ids of the captions of each image."""
    image_of_caption = np.repeat(np.arange(len(sentences)), [len(per_image) for per_image in sentences])
    return CaptionBatch(features, [sentence for per_image in sentences for sentence in per_image], image_of_caption)


def make_caption_tokenizer(vocabulary: Vocabulary, max_words: int | None = None) -> EncodeCaption:
    """Returns a function that converts the first `max_words` words (or characters) of a caption to token ids."""
    limit = max_words or (_DEFAULT_MAX_CHARACTERS if vocabulary.unit == "characters" else _DEFAULT_MAX_WORDS)
    return lambda caption: vocabulary.encode_tokens(vocabulary.tokenize(caption)[:limit])


def get_feature_shape(dataset: ShardedDataset) -> list[int]:
    """Returns the shape of the features of one image: `[size]` or `[positions, channels]`."""
    return cast(list[int], dataset.config["encoder"]["shape"])


def average_positions(features: Features) -> Features:
    """Averages `[images, positions, channels]` over the positions; returns vectors `[images, size]` unchanged."""
    return features.mean(1, dtype=np.float32) if features.ndim == 3 else features


def read_features(
    dataset: ShardedDataset, shard: int, splits: Collection[str]
) -> Iterator[tuple[Features, list[list[str]]]]:
    """Yields the features `[rows, *shape]` and captions of the images in `splits`, in chunks."""
    shape, names = get_feature_shape(dataset), add_split_aliases(splits)
    for rows in dataset.read_batches(shard, ["split", "captions", "features"]):
        selected = np.array([split in names for split in rows["split"].to_pylist()], bool)
        if selected.any():
            features = vectors_to_numpy(rows["features"], shape)
            yield features[selected], rows["captions"].filter(selected).to_pylist()


def read_captions(dataset: ShardedDataset, splits: Sequence[str]) -> Iterator[str]:
    """Yields the captions of the images in `splits` without reading the features.

    Raises:
        DatasetError: no image in `splits` has a caption.
    """
    is_empty = True
    for captions in read_references(dataset, splits):
        is_empty = False
        yield from captions
    if is_empty:
        found = {
            split for shard in range(dataset.shards) for split in dataset.read(shard, ["split"])["split"].to_pylist()
        }
        raise DatasetError(
            f"{dataset.folder.uri}: expected captions in split {' or '.join(splits)}, got none; "
            f"the dataset has the splits {', '.join(sorted(found)) or 'none'}"
        )


def read_references(dataset: ShardedDataset, splits: Sequence[str]) -> Iterator[list[str]]:
    """Yields a list of captions for each captioned image in `splits` without reading the features."""
    for shard in range(dataset.shards):
        yield from _read_references_of_shard(dataset, shard, splits)


def _read_references_of_shard(dataset: ShardedDataset, shard: int, splits: Sequence[str]) -> Iterator[list[str]]:
    selected = add_split_aliases(splits)
    for rows in dataset.read_batches(shard, ["split", "captions"]):
        images = zip(rows["split"].to_pylist(), rows["captions"].to_pylist(), strict=True)
        yield from (captions for split, captions in images if split in selected and captions)


def count_training_data(
    dataset: ShardedDataset, train_splits: Sequence[str], validation_splits: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Returns the numbers of captioned images and captions in the training and validation splits, as JSON values."""
    data: dict[str, dict[str, Any]] = {}
    for use, splits in (("training", train_splits), ("validation", validation_splits)):
        counts = list(map(len, read_references(dataset, splits)))
        data[use] = {"splits": list(splits), "images": len(counts), "captions": sum(counts)}
    return data


def sample_features(dataset: ShardedDataset, splits: Sequence[str], count: int) -> npt.NDArray[np.float32]:
    """Returns the features `[images, *shape]` of about `count` images in `splits`, from the start of each shard."""
    per_shard = -(-count // max(1, dataset.shards))
    samples: list[Features] = []
    for shard in range(dataset.shards):
        remaining = per_shard
        for rows, _ in read_features(dataset, shard, splits):
            samples.append(rows[:remaining])
            remaining -= len(samples[-1])
            if not remaining:
                break
    return np.concatenate(samples).astype(np.float32)


def compute_mean_and_std(
    dataset: ShardedDataset, splits: Sequence[str], to_vectors: Callable[[Features], Features] = average_positions
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Computes the mean and standard deviation, `[size]`, of the vectors that `to_vectors` makes of the features."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for shard in range(dataset.shards):
        for rows, _ in read_features(dataset, shard, splits):
            vectors = to_vectors(rows).astype(np.float64)
            count += len(vectors)
            total = total + vectors.sum(0)
            squares = squares + np.square(vectors).sum(0)
    mean = total / max(count, 1)
    std = np.sqrt(np.maximum(squares / max(count, 1) - np.square(mean), 0))
    return mean.astype(np.float32), std.astype(np.float32)


def _group_shards(dataset: ShardedDataset, buffer_bytes: int, pooled: bool) -> list[tuple[int, ...]]:
    """Groups consecutive shards into buffers, assuming that all shards are as large as the largest."""
    # A marker is the file that records that a shard is complete.
    largest = max((marker.rows for marker in dataset.read_markers().values()), default=1)
    shape = get_feature_shape(dataset)
    value_bytes = dataset.schema.field("features").type.value_type.bit_width // 8
    row_bytes = 4 * shape[-1] if pooled else value_bytes * math.prod(shape)  # pooled features are float32
    per_group = max(1, buffer_bytes // max(1, largest * row_bytes))
    shards = range(dataset.shards)
    return [tuple(shards[first : first + per_group]) for first in shards[::per_group]]
