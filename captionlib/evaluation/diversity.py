"""What captions are like, whatever they describe: repeated from training or new, how many different ones, how long."""

from collections.abc import Iterable, Mapping, Sequence

from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.text.vocabulary import tokenize
from captionlib.evaluation.metrics import Metric, ratio

__all__ = ["IN_TRAINING", "MEAN_LENGTH", "count_variety", "describe_captions", "read_sentences"]

IN_TRAINING = "in_training"
"""The share of captions that stand, word by word, among the training sentences."""

MEAN_LENGTH = "mean_length"
"""Words a caption."""


def describe_captions(captions: Mapping[str, str], training: Iterable[str] = ()) -> list[Metric]:
    """The mean length of captions, and the share that the training set has, if its sentences are given.

    Sentences are the same if their words are, in the tokens of captionlib's vocabulary.

    Args:
        captions: by image id.
        training: the sentences of people that the captioner learned from.
    """
    words = [tuple(tokenize(caption)) for caption in captions.values()]
    metrics = [ratio(MEAN_LENGTH, [len(some) for some in words], [1] * len(words))]
    wanted = set(words)
    any_sentence, found = False, set()
    for sentence in training:
        any_sentence = True
        if (tokens := tuple(tokenize(sentence))) in wanted:
            found.add(tokens)
    if any_sentence:
        metrics.append(ratio(IN_TRAINING, [some in found for some in words], [1] * len(words)))
    return metrics


def count_variety(captions: Mapping[str, str]) -> dict[str, int]:
    """How many different captions there are, and how many different words they use.

    They are counts of the whole set and have no confidence interval: a resample repeats images, so it always has fewer.
    """
    words = [tuple(tokenize(caption)) for caption in captions.values()]
    return {"distinct_captions": len(set(words)), "vocabulary": len({word for some in words for word in some})}


def read_sentences(dataset: ShardedDataset, splits: Sequence[str]) -> Iterable[str]:
    """The sentences of these splits, none where there are none; memory holds a piece of a shard."""
    for shard in range(dataset.shards):
        for rows in dataset.read_batches(shard, ["split", "captions"]):
            for split, captions in zip(rows["split"].to_pylist(), rows["captions"].to_pylist(), strict=True):
                if split in splits:
                    yield from captions
