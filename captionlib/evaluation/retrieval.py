"""Evaluates how well a ranker (dual encoder) retrieves the references of an image and the image of a reference.

The scores follow Hodosh et al. 2013 (Framing image description as a ranking task): Recall@k, the fraction of queries
with a match among the first k results, and the median and mean rank of the first match, counted from 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from captionlib.data.batches.captions import read_features
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.checkpoints.checkpoint import LoadedRanker

__all__ = ["PROTOCOLS", "RetrievalScores", "rank_images", "rank_references", "score_ranker", "score_retrieval"]

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

_BLOCK_QUERIES = 512  # queries whose similarities to all items are in memory at a time


@dataclass(frozen=True)
class RetrievalProtocol:
    """Selects the images and references that are ranked together. By default, these are all images and references."""

    images: int | None = None  # number of images, beginning with the first
    references_per_image: int | None = None  # likewise
    fold_images: int | None = None  # images per fold; scores are means over folds


PROTOCOLS: Mapping[str, RetrievalProtocol] = {
    "all": RetrievalProtocol(),
    "flickr8k-1k": RetrievalProtocol(images=1000, references_per_image=5),
    "coco-1k": RetrievalProtocol(images=5000, references_per_image=5, fold_images=1000),
    "coco-5k": RetrievalProtocol(images=5000, references_per_image=5),
}
"""Protocols used in papers (except `all`): 1,000 images (Flickr8k, Flickr30k), the mean over five folds of 1,000 images
(COCO 1K), or 5,000 images (COCO 5K)."""


@dataclass(frozen=True)
class DirectionScores:
    """Scores of one direction of retrieval, as means over folds. Recalls range from 0 to 1.

    The median rank is rounded down, as is customary.
    """

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    median_rank: float
    mean_rank: float


@dataclass(frozen=True)
class RetrievalScores:
    """Scores of both retrieval directions, and the numbers of ranked images, ranked references and folds.

    In `image_to_text`, images are the queries. In `text_to_image`, references are the queries.
    """

    images: int
    references: int
    folds: int
    image_to_text: DirectionScores
    text_to_image: DirectionScores

    @property
    def mean_recall(self) -> float:
        """The mean of the six recalls, 0 to 1, as a single number to compare models."""
        directions = (self.image_to_text, self.text_to_image)
        return sum(each.recall_at_1 + each.recall_at_5 + each.recall_at_10 for each in directions) / 6


def score_ranker(
    ranker: LoadedRanker,
    features: ShardedDataset,
    splits: Sequence[str] = (),
    protocol: RetrievalProtocol = PROTOCOLS["all"],
) -> RetrievalScores:
    """Scores a ranker on images and references of a complete features dataset. Without `splits`, all splits are used.

    Raises:
        CheckpointError: the features come from a different encoder than the ranker's.
        ConfigError: there are fewer images than the protocol needs.
        DatasetError: these splits have no references.
    """
    ranker.require_encoder(features.config["encoder"])
    available = _read_splits(features)
    images = [np.empty((0, ranker.size), np.float32)]
    references: list[str] = []
    image_of_reference: list[int] = []
    count = 0
    for shard in range(features.shards):
        for rows, captions in read_features(features, shard, frozenset(splits) or available):
            images.append(ranker.encode_images(rows))
            for image_references in captions:
                references.extend(image_references)
                image_of_reference.extend([count] * len(image_references))
                count += 1
    if not references:
        raise DatasetError(
            f"{features.folder.uri}: no references in split {' or '.join(splits) or '(any)'}; "
            f"its splits are {', '.join(sorted(available)) or 'none'}"
        )
    vectors = ranker.encode_sentences(references)
    return score_retrieval(np.concatenate(images), vectors, np.array(image_of_reference, np.int64), protocol)


def _read_splits(dataset: ShardedDataset) -> frozenset[str]:
    columns = (dataset.read(shard, ["split"])["split"] for shard in range(dataset.shards))
    return frozenset(split for column in columns for split in column.unique().to_pylist())


def score_retrieval(
    images: Vectors,
    references: Vectors,
    image_of_reference: Indices,
    protocol: RetrievalProtocol = PROTOCOLS["all"],
) -> RetrievalScores:
    """Ranks all references for each image, and all images for each reference.

    Each item that ties with the match adds half a rank, and the sum is rounded down. A model whose similarities are all
    equal therefore scores at chance level.

    `images` and `references` are unit vectors, `[images, joint_embedding_size]` and `[references,
    joint_embedding_size]`. `image_of_reference`, `[references]`, contains the row in `images` of each reference's
    image, in ascending order. Images without references are ignored.

    Raises:
        ConfigError: there are fewer images than a fold needs.
        DatasetError: there are no references.
    """
    folds = list(_split_into_folds(image_of_reference, protocol))
    image_to_text: list[DirectionScores] = []
    text_to_image: list[DirectionScores] = []
    for fold_images, fold_references in folds:
        image_in_fold = np.searchsorted(fold_images, image_of_reference[fold_references])
        vectors = images[fold_images], references[fold_references]
        image_to_text.append(_summarize(rank_references(*vectors, image_in_fold)))
        text_to_image.append(_summarize(rank_images(*vectors, image_in_fold)))
    return RetrievalScores(
        images=sum(len(fold_images) for fold_images, _ in folds),
        references=sum(len(fold_references) for _, fold_references in folds),
        folds=len(folds),
        image_to_text=_average(image_to_text),
        text_to_image=_average(text_to_image),
    )


def rank_references(images: Vectors, references: Vectors, image_of_reference: Indices) -> Indices:
    """Returns the rank of each image's first matching reference, `[images]`, counted from 1."""
    ranks = []
    for begin in range(0, len(images), _BLOCK_QUERIES):
        similarities = images[begin : begin + _BLOCK_QUERIES] @ references.T
        matches = image_of_reference == np.arange(begin, begin + len(similarities))[:, None]
        best = np.where(matches, similarities, -np.inf).max(1, keepdims=True)
        ranks.append(_rank(similarities, best, ~matches))
    return np.concatenate(ranks)


def rank_images(images: Vectors, references: Vectors, image_of_reference: Indices) -> Indices:
    """Returns the rank of each reference's image, `[references]`, counted from 1."""
    ranks = []
    for begin in range(0, len(references), _BLOCK_QUERIES):
        match = image_of_reference[begin : begin + _BLOCK_QUERIES, None]
        similarities = references[begin : begin + _BLOCK_QUERIES] @ images.T
        best = np.take_along_axis(similarities, match, 1)
        ranks.append(_rank(similarities, best, match != np.arange(len(images))))
    return np.concatenate(ranks)


def _rank(similarities: Vectors, best: Vectors, is_other: npt.NDArray[np.bool_]) -> Indices:
    better = ((similarities > best) & is_other).sum(1)
    ties = ((similarities == best) & is_other).sum(1)
    ranks: Indices = 1 + better + ties // 2
    return ranks


def _split_into_folds(image_of_reference: Indices, protocol: RetrievalProtocol) -> Iterator[tuple[Indices, Indices]]:
    """Yields the row numbers of the images and of the references in each fold."""
    images, first, counts = np.unique(image_of_reference, return_index=True, return_counts=True)
    if not len(images):
        raise DatasetError("expected references to rank, got none; pass features of a split that has references")
    position = np.arange(len(image_of_reference)) - np.repeat(first, counts)  # index of a reference within its image
    images = images[: protocol.images]
    size = protocol.fold_images or len(images)
    if len(images) < size:
        raise ConfigError(
            f"protocol: expected at least {size:,} images with references, got {len(images):,}; evaluate a larger "
            "split, or use the protocol `all`"
        )
    for begin in range(0, len(images) - size + 1, size):
        fold = images[begin : begin + size]
        selected = np.isin(image_of_reference, fold)
        if protocol.references_per_image is not None:
            selected &= position < protocol.references_per_image
        yield fold, np.flatnonzero(selected)


def _summarize(ranks: Indices) -> DirectionScores:
    return DirectionScores(
        recall_at_1=float((ranks <= 1).mean()),
        recall_at_5=float((ranks <= 5).mean()),
        recall_at_10=float((ranks <= 10).mean()),
        median_rank=float(np.floor(np.median(ranks))),
        mean_rank=float(ranks.mean()),
    )


def _average(folds: Sequence[DirectionScores]) -> DirectionScores:
    names = DirectionScores.__dataclass_fields__
    return DirectionScores(**{name: float(np.mean([getattr(fold, name) for fold in folds])) for name in names})
