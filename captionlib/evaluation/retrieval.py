"""Scores of ranking: where among all sentences an image finds its own, and among all images a sentence.

The figures are those of Hodosh et al. 2013 (Framing image description as a ranking task) and all who followed: the
share of queries that find what belongs to them among the first k (Recall@k), the median and the mean rank, from 1 on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from captionlib.errors import ConfigError, DatasetError

__all__ = ["PROTOCOLS", "DirectionScores", "RankingProtocol", "RankingScores", "score_ranking"]

Vectors = npt.NDArray[np.float32]
Ranks = npt.NDArray[np.int64]

_BLOCK = 512  # queries whose scores with everything are in memory together


@dataclass(frozen=True)
class RankingProtocol:
    """Which images and sentences are ranked among each other.

    Attributes:
        images: at the most so many, the first; None is all.
        sentences: at the most so many an image, the first; None is all.
        fold_images: rank among so many images at a time, and average over these folds; None is among all.
    """

    images: int | None = None
    sentences: int | None = None
    fold_images: int | None = None


PROTOCOLS: Mapping[str, RankingProtocol] = {
    "all": RankingProtocol(),
    "flickr8k-1k": RankingProtocol(images=1000, sentences=5),
    "coco-1k": RankingProtocol(images=5000, sentences=5, fold_images=1000),
    "coco-5k": RankingProtocol(images=5000, sentences=5),
}
"""What papers report: Flickr8k's (and 30k's) 1,000 images, COCO's 5,000, and the mean of COCO's five folds of 1,000."""


@dataclass(frozen=True)
class DirectionScores:
    """How well one direction ranks.

    Attributes:
        recall_at_1: share of queries that have something of their own in the first place, 0 to 1.
        recall_at_5: among the first five.
        recall_at_10: among the first ten.
        median_rank: of the first that is the query's own, rounded down, as is usual; of folds the mean of theirs.
        mean_rank: likewise.
    """

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    median_rank: float
    mean_rank: float


@dataclass(frozen=True)
class RankingScores:
    """How well images and sentences find each other.

    Attributes:
        images: how many images were ranked.
        sentences: how many sentences.
        folds: in how many folds; 1 is all among each other.
        image_to_sentence: an image asks, all sentences are ranked.
        sentence_to_image: a sentence asks, all images are ranked.
    """

    images: int
    sentences: int
    folds: int
    image_to_sentence: DirectionScores
    sentence_to_image: DirectionScores

    @property
    def mean_recall(self) -> float:
        """The mean of the six recalls, 0 to 1: one number to compare models by."""
        directions = (self.image_to_sentence, self.sentence_to_image)
        return sum(one.recall_at_1 + one.recall_at_5 + one.recall_at_10 for one in directions) / 6


def score_ranking(
    images: Vectors,
    sentences: Vectors,
    image_of_sentence: npt.NDArray[np.int64],
    protocol: RankingProtocol = PROTOCOLS["all"],
) -> RankingScores:
    """Ranks all sentences by each image and all images by each sentence.

    Ties are broken half for and half against, so that a model that finds everything alike ranks as chance would.

    Args:
        images: `[images, size]`, unit vectors.
        sentences: `[sentences, size]`, unit vectors.
        image_of_sentence: `[sentences]`, the row of `images` that a sentence belongs to, ascending. Images may have
            any number of sentences; those without any are left out.
        protocol: what is ranked among what.

    Raises:
        ConfigError: there are fewer images than one fold has.
        DatasetError: there are no sentences.
    """
    folds = list(_folds(image_of_sentence, protocol))
    to_sentence: list[DirectionScores] = []
    to_image: list[DirectionScores] = []
    count = 0
    for kept_images, kept_sentences in folds:
        own = np.searchsorted(kept_images, image_of_sentence[kept_sentences])
        of_images, of_sentences = images[kept_images], sentences[kept_sentences]
        to_sentence.append(_summarise(rank_sentences(of_images, of_sentences, own)))
        to_image.append(_summarise(rank_images(of_images, of_sentences, own)))
        count += len(kept_sentences)
    return RankingScores(
        images=sum(len(kept) for kept, _ in folds),
        sentences=count,
        folds=len(folds),
        image_to_sentence=_average(to_sentence),
        sentence_to_image=_average(to_image),
    )


def rank_sentences(images: Vectors, sentences: Vectors, image_of_sentence: npt.NDArray[np.int64]) -> Ranks:
    """For each image the rank of the first sentence of its own, `[images]`, from 1."""
    ranks = []
    for begin in range(0, len(images), _BLOCK):
        scores = images[begin : begin + _BLOCK] @ sentences.T
        own = image_of_sentence == np.arange(begin, begin + len(scores))[:, None]
        best = np.where(own, scores, -np.inf).max(1, keepdims=True)
        ranks.append(_rank(scores, best, ~own))
    return np.concatenate(ranks)


def rank_images(images: Vectors, sentences: Vectors, image_of_sentence: npt.NDArray[np.int64]) -> Ranks:
    """For each sentence the rank of its image, `[sentences]`, from 1."""
    ranks = []
    for begin in range(0, len(sentences), _BLOCK):
        own = image_of_sentence[begin : begin + _BLOCK, None]
        scores = sentences[begin : begin + _BLOCK] @ images.T
        ranks.append(_rank(scores, np.take_along_axis(scores, own, 1), own != np.arange(len(images))))
    return np.concatenate(ranks)


def _rank(scores: Vectors, best: Vectors, rivals: npt.NDArray[np.bool_]) -> Ranks:
    better = ((scores > best) & rivals).sum(1)
    ties = ((scores == best) & rivals).sum(1)
    ranks: Ranks = 1 + better + ties // 2
    return ranks


def _folds(
    image_of_sentence: npt.NDArray[np.int64], protocol: RankingProtocol
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """The rows of images and of sentences that are ranked together."""
    kept_images, first, counts = np.unique(image_of_sentence, return_index=True, return_counts=True)
    if not len(kept_images):
        raise DatasetError("expected sentences to rank, got none; give features of a split that has sentences")
    place = np.arange(len(image_of_sentence)) - np.repeat(first, counts)  # of each sentence among those of its image
    kept_images = kept_images[: protocol.images]
    size = protocol.fold_images or len(kept_images)
    if len(kept_images) < size:
        raise ConfigError(
            f"protocol: expected at least {size:,} images with sentences, got {len(kept_images):,}; rank a larger "
            "split, or take the protocol `all`"
        )
    for begin in range(0, len(kept_images) - size + 1, size):
        fold = kept_images[begin : begin + size]
        chosen = np.isin(image_of_sentence, fold)
        if protocol.sentences is not None:
            chosen &= place < protocol.sentences
        yield fold, np.flatnonzero(chosen)


def _summarise(ranks: Ranks) -> DirectionScores:
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
