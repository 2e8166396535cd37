"""Measures the diversity of captions: mean length, novelty, number of distinct captions, and vocabulary size."""

from collections.abc import Iterable, Mapping

from captionlib.data.text.vocabulary import tokenize
from captionlib.evaluation.ideographs import separate_characters
from captionlib.evaluation.metrics import Metric, compute_ratio

__all__ = ["MEAN_LENGTH", "NOVEL", "count_diversity", "measure_captions"]

NOVEL = "novel"
"""The fraction of captions that do not occur verbatim among the references of the training set."""

MEAN_LENGTH = "mean_length"
"""The mean number of words per caption."""


def measure_captions(captions: Mapping[str, str], training_references: Iterable[str] = ()) -> list[Metric]:
    """Computes the mean length of captions and, if there are training references, the fraction of novel captions."""
    tokenized = [_tokenize(caption) for caption in captions.values()]
    ones = [1] * len(tokenized)  # denominators, so that the score is the mean over captions
    metrics = [compute_ratio(MEAN_LENGTH, [len(tokens) for tokens in tokenized], ones)]
    distinct, copied, has_references = set(tokenized), set(), False
    for reference in training_references:
        has_references = True
        if (tokens := _tokenize(reference)) in distinct:
            copied.add(tokens)
    if has_references:
        metrics.append(compute_ratio(NOVEL, [tokens not in copied for tokens in tokenized], ones))
    return metrics


def count_diversity(captions: Mapping[str, str]) -> dict[str, int]:
    """Counts the distinct captions and the distinct words in them. Resamples repeat images, so there is no interval."""
    tokenized = {_tokenize(caption) for caption in captions.values()}
    return {
        "distinct_captions": len(tokenized),
        "vocabulary_size": len({token for tokens in tokenized for token in tokens}),
    }


def _tokenize(text: str) -> tuple[str, ...]:
    return tuple(tokenize(separate_characters(text)))
