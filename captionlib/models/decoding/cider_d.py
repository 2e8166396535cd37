"""Computes CIDEr-D between all pairs of sentences from two lists, fast enough for every training step.

The formula is from Vedantam et al. 2015 (arXiv 1411.5726) as implemented in pycocoevalcap: n-grams weighted by tf-idf,
clipped counts, and a Gaussian penalty on the difference in length, measured in bigrams.

N-grams are packed into 64-bit integers, counted by sorting, and matched by matrix products.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from captionlib.errors import ConfigError, DatasetError

__all__ = ["CiderD"]

_MAX_N = 4  # n-grams of 1 to 4 words
_SIGMA = 6.0  # standard deviation of the Gaussian length penalty, in bigrams
_WORD_BITS = 16  # bits per word in a packed n-gram: the word's id + 1, or 0 if the n-gram is shorter
_MAX_VOCABULARY = (1 << _WORD_BITS) - 1

Floats = npt.NDArray[np.float64]
NgramIds = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]


class CiderD:
    """Computes CIDEr-D.

    Args:
        references: token ids of the references of each training image, for document frequencies. If None, all n-grams
            have equal weight.

    Raises:
        DatasetError: there are fewer than two images, so document frequencies would be meaningless.
    """

    def __init__(self, references: Iterable[Sequence[Sequence[int]]] | None = None) -> None:
        self._rare_weight, self._common_ids, self._common_weights = 1.0, np.empty(0, np.uint64), np.empty(0)
        if references is None:
            return
        per_image = [np.unique(_extract_ngrams(sentences).ids) for sentences in references]
        if len(per_image) < 2:
            raise DatasetError(
                "CIDEr weights words by the number of images whose references contain them; expected at least two "
                f"training images, got {len(per_image)}"
            )
        ids, counts = np.unique(np.concatenate(per_image), return_counts=True)
        self._rare_weight = float(np.log(len(per_image)))  # for n-grams in at most one image
        self._common_ids = ids[counts > 1]
        self._common_weights = self._rare_weight - np.log(counts[counts > 1])

    def score(self, sentences: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> list[float]:
        """Computes the CIDEr-D (0 to 10, usually reported times 100) of each sentence against the references."""
        scores: list[float] = (10 * self.compare(sentences, references).mean(1)).tolist()
        return scores

    def compare(self, sentences: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> Floats:
        """Computes a tenth of the CIDEr-D of each sentence (row) against each single reference (column)."""
        sentence_ngrams, reference_ngrams = _extract_ngrams(sentences), _extract_ngrams(references)
        distinct, column = np.unique(np.concatenate([sentence_ngrams.ids, reference_ngrams.ids]), return_inverse=True)
        weights, end = self._compute_idf(distinct), len(sentence_ngrams.ids)
        sentence_counts = _NgramCounts(sentence_ngrams, column[:end], weights)
        reference_counts = _NgramCounts(reference_ngrams, column[end:], weights)
        columns = np.unique(column[:end])  # n-grams that occur only in the references match nothing
        total = np.zeros((len(sentences), len(references)))
        # An n-gram contributes min(sentence count, reference count) * reference count * squared idf, divided by both
        # norms. The minimum of two counts is the number of thresholds 1, 2, ... that both counts reach.
        for threshold in range(1, sentence_counts.max_count + 1):
            scaled = reference_counts.at_least(threshold, reference_counts.counts, columns)
            total += sentence_counts.at_least(threshold, 1, columns) @ scaled.T
        sentence_bigrams = np.maximum(sentence_ngrams.lengths - 1, 0)
        reference_bigrams = np.maximum(reference_ngrams.lengths - 1, 0)
        length_gap = sentence_bigrams[:, None] - reference_bigrams[None]
        return total / _MAX_N * np.exp(-(length_gap**2) / (2 * _SIGMA**2))

    def _compute_idf(self, ids: NgramIds) -> Floats:
        weights = np.full(len(ids), self._rare_weight)
        if len(self._common_ids):
            index = np.searchsorted(self._common_ids, ids).clip(max=len(self._common_ids) - 1)
            is_common = self._common_ids[index] == ids
            weights[is_common] = self._common_weights[index[is_common]]
        return weights


class _Ngrams(NamedTuple):
    """All n-grams of several sentences, repeated ones included."""

    ids: NgramIds
    sentences: Indices  # the sentence of each n-gram
    sizes: Indices  # words of each n-gram
    lengths: Indices  # words of each sentence


def _extract_ngrams(sentences: Sequence[Sequence[int]]) -> _Ngrams:
    lengths = np.array([len(sentence) for sentence in sentences], np.int64)
    words = np.fromiter((word for sentence in sentences for word in sentence), np.int64, lengths.sum()) + 1
    if len(words) and not 1 <= words.min() <= words.max() <= _MAX_VOCABULARY:
        raise ConfigError(
            f"CIDEr supports {_MAX_VOCABULARY:,} words, got word ids {words.min() - 1} to {words.max() - 1}; "
            "use a smaller vocabulary (raise min_count)"
        )
    sentence_of_word = np.repeat(np.arange(len(lengths)), lengths)
    remaining = np.repeat(lengths.cumsum(), lengths) - np.arange(len(words))  # words to the sentence's end, inclusive
    ids, ngram_sentences, sizes = [], [], []
    packed = words.astype(np.uint64)
    for n in range(1, _MAX_N + 1):
        if n > 1 and len(packed):  # append the next word
            packed = (packed[:-1] << np.uint64(_WORD_BITS)) | words[n - 1 :].astype(np.uint64)
        starts = np.flatnonzero(remaining[: len(packed)] >= n)
        ids.append(packed[starts])
        ngram_sentences.append(sentence_of_word[starts])
        sizes.append(np.full(len(starts), n))
    return _Ngrams(np.concatenate(ids), np.concatenate(ngram_sentences), np.concatenate(sizes), lengths)


class _NgramCounts:
    """Each n-gram's count in each sentence, and its idf weight divided by the norm of the sentence's tf-idf vector.

    `column` is the index of each n-gram among the distinct n-grams. `weights` has the idf of each distinct n-gram.
    """

    def __init__(self, ngrams: _Ngrams, column: Indices, weights: Floats) -> None:
        self._sentences, distinct_count = len(ngrams.lengths), max(1, len(weights))
        cells, first_index, self.counts = np.unique(
            ngrams.sentences * distinct_count + column, return_index=True, return_counts=True
        )
        self._row, self._column = np.divmod(cells, distinct_count)
        self.max_count = int(self.counts.max(initial=0))
        vector_index = self._row * _MAX_N + ngrams.sizes[first_index] - 1  # a sentence has one vector per n
        squares = np.bincount(vector_index, (self.counts * weights[self._column]) ** 2, self._sentences * _MAX_N)
        norms = np.sqrt(squares)[vector_index]
        self._normalized = np.divide(weights[self._column], norms, out=np.zeros_like(norms), where=norms > 0)

    def at_least(self, minimum: int, factors: Indices | int, columns: Indices) -> Floats:
        """Returns the normalized weight of each n-gram times its factor, or 0 if it occurs fewer than `minimum` times.

        The result is `[sentences, columns]`.
        """
        matrix = np.zeros((self._sentences, len(columns)))
        selected = (self.counts >= minimum) & np.isin(self._column, columns)
        column = np.searchsorted(columns, self._column[selected])
        matrix[self._row[selected], column] = (self._normalized * factors)[selected]
        return matrix
