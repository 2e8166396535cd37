"""CIDEr-D of single sentences, as word ids: quick enough to be asked at every step of a training.

The formula is that of Vedantam et al. 2015 (arXiv 1411.5726) as pycocoevalcap has it: n-grams weighed by tf-idf, counts
clipped, and a Gaussian penalty on the length. Document frequencies are those of all training images, where an
evaluation takes those of the images that it scores.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from captionlib.errors import DatasetError

__all__ = ["CiderReward"]

_LONGEST = 4  # n-grams of 1 to 4 words
_SIGMA = 6.0  # of the penalty, in words

Ngram = tuple[int, ...]


class _Vector(NamedTuple):
    """A sentence.

    Attributes:
        weights: tf-idf of its n-grams, a mapping for each n.
        norms: the length of each of these vectors.
        bigrams: how many it has, which the length penalty goes by.
    """

    weights: list[dict[Ngram, float]]
    norms: list[float]
    bigrams: int


class CiderReward:
    """Scores sentences against what people said of their image.

    Args:
        references: the sentences of each training image, as word ids; read once, not kept.

    Raises:
        DatasetError: there are fewer than two images, for which CIDEr means nothing.
    """

    def __init__(self, references: Iterable[Sequence[Sequence[int]]]) -> None:
        images = 0
        frequencies: Counter[Ngram] = Counter()
        for sentences in references:
            images += 1
            frequencies.update({ngram for sentence in sentences for ngram in _ngrams(sentence)})
        if images < 2:
            raise DatasetError(
                f"CIDEr weighs words by how many images' references have them; expected several images to learn from, "
                f"got {images}; take objective cross_entropy"
            )
        self._rare = math.log(images)  # what no two images share weighs as much as what none has
        self._common = {ngram: self._rare - math.log(count) for ngram, count in frequencies.items() if count > 1}

    def score(self, sentences: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> list[float]:
        """CIDEr-D (0 to 10, usually told times 100) of each of some sentences for one image with these references."""
        vectors = [self._weigh(reference) for reference in references]
        return [self._compare(self._weigh(sentence), vectors) for sentence in sentences]

    def _weigh(self, sentence: Sequence[int]) -> _Vector:
        weights: list[dict[Ngram, float]] = [{} for _ in range(_LONGEST)]
        squares = [0.0] * _LONGEST
        for ngram, count in Counter(_ngrams(sentence)).items():
            weight = count * self._common.get(ngram, self._rare)
            weights[len(ngram) - 1][ngram] = weight
            squares[len(ngram) - 1] += weight * weight
        return _Vector(weights, [math.sqrt(square) for square in squares], max(0, len(sentence) - 1))

    def _compare(self, sentence: _Vector, references: Sequence[_Vector]) -> float:
        total = 0.0
        for reference in references:
            similarity = 0.0
            for mine, theirs, norm, other in zip(
                sentence.weights, reference.weights, sentence.norms, reference.norms, strict=True
            ):
                if shared := mine.keys() & theirs.keys():
                    dot = sum(min(mine[ngram], theirs[ngram]) * theirs[ngram] for ngram in shared)
                    similarity += dot / (norm * other) if norm and other else 0.0
            distance = sentence.bigrams - reference.bigrams
            total += similarity * math.exp(-(distance**2) / (2 * _SIGMA**2))
        return 10 * total / (_LONGEST * len(references))


def _ngrams(sentence: Sequence[int]) -> Iterable[Ngram]:
    words = tuple(sentence)
    return (words[begin : begin + n] for n in range(1, _LONGEST + 1) for begin in range(len(words) - n + 1))
