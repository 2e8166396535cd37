"""Measures captions without their own references: length, novelty, distinct captions, vocabulary size."""

from collections.abc import Iterable, Mapping

from captionlib.data.text.vocabulary import tokenize
from captionlib.evaluation.metrics import Metric, compute_ratio

__all__ = ["MEAN_LENGTH", "NOVEL", "count_diversity", "measure_captions"]

NOVEL = "novel"
"""The share of captions that do not occur, word for word, among the references of the training set."""

MEAN_LENGTH = "mean_length"
"""Words per caption."""


def measure_captions(captions: Mapping[str, str], training_references: Iterable[str] = ()) -> list[Metric]:
    """Measures the mean length of captions and, given the references of the training set, the share of novel captions.

    Captions and references are compared token by token, as captionlib's vocabulary splits them.
    """
    tokenized = [tuple(tokenize(caption)) for caption in captions.values()]
    ones = [1] * len(tokenized)
    metrics = [compute_ratio(MEAN_LENGTH, [len(tokens) for tokens in tokenized], ones)]
    distinct, copied, has_references = set(tokenized), set(), False
    for reference in training_references:
        has_references = True
        if (tokens := tuple(tokenize(reference))) in distinct:
            copied.add(tokens)
    if has_references:
        metrics.append(compute_ratio(NOVEL, [tokens not in copied for tokens in tokenized], ones))
    return metrics


def count_diversity(captions: Mapping[str, str]) -> dict[str, int]:
    """Counts the distinct captions and the distinct words in them (the vocabulary size).

    These counts have no confidence interval: a resample repeats images, so its counts are always lower.
    """
    tokenized = {tuple(tokenize(caption)) for caption in captions.values()}
    return {
        "distinct_captions": len(tokenized),
        "vocabulary_size": len({token for tokens in tokenized for token in tokens}),
    }
