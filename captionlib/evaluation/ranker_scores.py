"""Scores of a ranker on the images and sentences of `features/`."""

import os
from collections.abc import Sequence

import numpy as np

from captionlib.data.batches.captions import read_features
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.errors import DatasetError
from captionlib.evaluation.retrieval import PROTOCOLS, RankingProtocol, RankingScores, score_ranking
from captionlib.models.checkpoints.checkpoint import LoadedRanker, load_ranker

__all__ = ["score_ranker", "score_ranker_folder"]


def score_ranker(
    ranker: LoadedRanker,
    features: ShardedDataset,
    splits: Sequence[str] = (),
    protocol: RankingProtocol = PROTOCOLS["all"],
) -> RankingScores:
    """Ranks the images of these splits (of all, if none is given) and their sentences by each other.

    Args:
        ranker: the model.
        features: of its encoder, complete.
        splits: which rows.
        protocol: what is ranked among what.

    Raises:
        CheckpointError: the features are of another encoder than the ranker's.
        DatasetError: these splits have no sentences.
    """
    ranker.require_encoder(features.config["encoder"])
    seen = _splits_of(features)
    chosen = frozenset(splits) or seen
    images = [np.empty((0, ranker.size), np.float32)]
    sentences: list[str] = []
    owners: list[int] = []
    count = 0
    for shard in range(features.shards):
        for rows, captions in read_features(features, shard, chosen):
            images.append(ranker.encode_features(rows))
            for row in captions:
                sentences.extend(row)
                owners.extend([count] * len(row))
                count += 1
    if not sentences:
        raise DatasetError(
            f"{features.folder.uri}: no sentences in split {' or '.join(splits) or '(any)'}; "
            f"its splits are {', '.join(sorted(seen)) or 'none'}"
        )
    vectors = ranker.encode_sentences(sentences)
    return score_ranking(np.concatenate(images), vectors, np.array(owners, np.int64), protocol)


def score_ranker_folder(
    ranker: str | os.PathLike[str],
    features: str | os.PathLike[str],
    splits: Sequence[str] = (),
    protocol: RankingProtocol = PROTOCOLS["all"],
    device: str = "auto",
) -> RankingScores:
    """The same, of a checkpoint and a dataset that are still to be opened.

    Raises:
        CheckpointError: there is no ranker, or the features are of another encoder.
        DatasetError: the features are not complete, or these splits have no sentences.
    """
    return score_ranker(
        load_ranker(ranker, device), open_dataset(features, "features").require_complete(), splits, protocol
    )


def _splits_of(dataset: ShardedDataset) -> frozenset[str]:
    columns = (dataset.read(shard, ["split"])["split"] for shard in range(dataset.shards))
    return frozenset(split for column in columns for split in column.unique().to_pylist())
