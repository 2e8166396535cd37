"""CIDEr-D between sentences of word ids, all of some with all of others: quick enough to be asked at every step.

The formula is that of Vedantam et al. 2015 (arXiv 1411.5726) as pycocoevalcap has it: n-grams weighed by tf-idf, counts
clipped, and a Gaussian penalty on the length. Document frequencies are those of all training images, where an
evaluation takes those of the images that it scores.

An n-gram of up to four words is one number of 64 bits, so that all of it is done by sorting and one matrix product.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from captionlib.errors import ConfigError, DatasetError

__all__ = ["CiderD"]

_LONGEST = 4  # n-grams of 1 to 4 words
_SIGMA = 6.0  # of the penalty, in words
_BITS = 16  # of a word
_WORDS = (1 << _BITS) - 1  # as many can be told apart; 0 stands for no word

Matrix = npt.NDArray[np.float64]
Ids = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


class CiderD:
    """Compares sentences.

    Args:
        references: the sentences of each training image, as word ids; read once, not kept. None gives all n-grams the
            same weight.

    Raises:
        DatasetError: there are fewer than two images, for which CIDEr means nothing.
    """

    def __init__(self, references: Iterable[Sequence[Sequence[int]]] | None = None) -> None:
        self._rare, self._common, self._weights = 1.0, np.empty(0, np.uint64), np.empty(0)
        if references is None:
            return
        of_images = [np.unique(_ngrams(sentences).ids) for sentences in references]
        if len(of_images) < 2:
            raise DatasetError(
                f"CIDEr weighs words by how many images' references have them; expected several images to learn from, "
                f"got {len(of_images)}"
            )
        ids, counts = np.unique(np.concatenate(of_images), return_counts=True)
        self._rare = float(np.log(len(of_images)))  # what no two images share weighs as much as what none has
        self._common, self._weights = ids[counts > 1], self._rare - np.log(counts[counts > 1])

    def score(self, sentences: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> list[float]:
        """CIDEr-D (0 to 10, usually told times 100) of each of some sentences for one image with these references."""
        scores: list[float] = (10 * self.compare(sentences, references).mean(1)).tolist()
        return scores

    def compare(self, sentences: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> Matrix:
        """How alike each sentence (row) is to each reference (column): a tenth of its CIDEr-D for that one alone."""
        mine, theirs = _ngrams(sentences), _ngrams(references)
        different, column = np.unique(np.concatenate([mine.ids, theirs.ids]), return_inverse=True)
        weights, split = self._weigh(different), len(mine.ids)
        of_mine = _Counted(mine, column[:split], weights)
        of_theirs = _Counted(theirs, column[split:], weights)
        kept = np.unique(column[:split])  # what else there is on the other side is shared by none
        shared = np.zeros((len(sentences), len(references)))
        for times in range(1, of_mine.most + 1):  # min(a, b) is the sum over times of a >= times and b >= times
            shared += of_mine.at_least(times, 1, kept) @ of_theirs.at_least(times, of_theirs.counts, kept).T
        apart = np.maximum(mine.words - 1, 0)[:, None] - np.maximum(theirs.words - 1, 0)[None]
        return shared / _LONGEST * np.exp(-(apart**2) / (2 * _SIGMA**2))

    def _weigh(self, ids: Ids) -> Matrix:
        """The inverse document frequency of n-grams, which are in ascending order."""
        weights = np.full(len(ids), self._rare)
        if len(self._common):
            places = np.searchsorted(self._common, ids).clip(max=len(self._common) - 1)
            known = self._common[places] == ids
            weights[known] = self._weights[places[known]]
        return weights


class _Ngrams(NamedTuple):
    """The n-grams of some sentences, each as often as it is there.

    Attributes:
        ids: what they are.
        sentences: where they are.
        lengths: their n.
        words: `[sentences]`, how many each has.
    """

    ids: Ids
    sentences: Places
    lengths: Places
    words: Places


def _ngrams(sentences: Sequence[Sequence[int]]) -> _Ngrams:
    words = np.array([len(sentence) for sentence in sentences], np.int64)
    flat = np.fromiter((word for sentence in sentences for word in sentence), np.int64, words.sum()) + 1
    if len(flat) and not 1 <= flat.min() <= flat.max() <= _WORDS:
        raise ConfigError(
            f"CIDEr tells {_WORDS:,} words apart, got the ids {flat.min() - 1} to {flat.max() - 1}; "
            "take a vocabulary of fewer words (min_count)"
        )
    sentence = np.repeat(np.arange(len(words)), words)
    left = np.repeat(words.cumsum(), words) - np.arange(len(flat))  # of its sentence, this word among them
    ids, owners, lengths = [], [], []
    packed = flat.astype(np.uint64)
    for n in range(1, _LONGEST + 1):
        if n > 1:  # one word more, where there is one
            packed = (packed[:-1] << np.uint64(_BITS)) | flat[n - 1 :].astype(np.uint64) if len(packed) else packed
        begins = np.flatnonzero(left[: len(packed)] >= n)
        ids.append(packed[begins])
        owners.append(sentence[begins])
        lengths.append(np.full(len(begins), n))
    return _Ngrams(np.concatenate(ids), np.concatenate(owners), np.concatenate(lengths), words)


class _Counted:
    """How often each sentence has each n-gram, where it has it, and how much that is of all that it has of this n.

    Args:
        ngrams: of sentences.
        column: of each, among all different ones.
        weights: of each column.
    """

    def __init__(self, ngrams: _Ngrams, column: Places, weights: Matrix) -> None:
        self._rows, columns = len(ngrams.words), max(1, len(weights))
        cells, first, self.counts = np.unique(
            ngrams.sentences * columns + column, return_index=True, return_counts=True
        )
        self._row, self._column = np.divmod(cells, columns)
        self.most = int(self.counts.max(initial=0))
        vector = self._row * _LONGEST + ngrams.lengths[first] - 1  # each sentence has one for each n
        squares = np.bincount(vector, (self.counts * weights[self._column]) ** 2, self._rows * _LONGEST)
        norms = np.sqrt(squares)[vector]
        self._share = np.divide(weights[self._column], norms, out=np.zeros_like(norms), where=norms > 0)

    def at_least(self, times: int, factors: Places | int, kept: Places) -> Matrix:
        """`[sentences, kept columns]`: weight by norm, times its factor, of what a sentence has so often or more."""
        matrix = np.zeros((self._rows, len(kept)))
        there = (self.counts >= times) & np.isin(self._column, kept)
        matrix[self._row[there], np.searchsorted(kept, self._column[there])] = (self._share * factors)[there]
        return matrix
