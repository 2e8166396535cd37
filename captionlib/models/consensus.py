"""Which of an image's candidates the others agree with most: choice by minimum Bayes risk (Kumar & Byrne 2004).

    u(a, b) = BLEU of a, with b for its only reference; n-grams of 2 to 4 words are counted one up (Lin & Och 2004)
    agreement(a) = sum_b p(b) ** (1 / temperature) u(a, b)

The likeliest sentence is often one that few others resemble. The one that would score best if any of the others were
what a person says scores better with what people say.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from captionlib.models.decoding_config import Candidate

__all__ = ["order_by_consensus"]

_LONGEST = 4  # n-grams of 1 to 4 words

Matrix = npt.NDArray[np.float64]


def order_by_consensus(candidates: Sequence[Candidate], temperature: float) -> list[Candidate]:
    """The candidates of an image, first what the others agree with most; among equals in the order given.

    Args:
        candidates: all different.
        temperature: above 0; the lower, the more the likeliest decide alone.
    """
    log_probs = np.array([one.log_prob for one in candidates])
    weights = np.exp((log_probs - log_probs.max()) / temperature)
    agreement = (_bleu_of_each([one.words for one in candidates]) @ weights).round(12)  # equals are to be equal
    return [candidates[place] for place in np.argsort(-agreement, kind="stable")]


def _bleu_of_each(sentences: Sequence[Sequence[int]]) -> Matrix:
    """BLEU-4 of each sentence (row) with each other (column) for its only reference."""
    lengths = np.array([len(sentence) for sentence in sentences], np.float64)
    logs = np.zeros((len(sentences), len(sentences)))
    with np.errstate(divide="ignore"):  # no word in common: ln 0, and a BLEU of 0
        for n in range(1, _LONGEST + 1):
            one_up = 0 if n == 1 else 1
            counts = np.maximum(lengths - n + 1, 1 - one_up)[:, None]
            logs += np.log((_matches(sentences, n) + one_up) / (counts + one_up))
        brevity = np.minimum(0, 1 - lengths[None, :] / np.maximum(lengths, 1)[:, None])
    bleu: Matrix = np.exp(logs / _LONGEST + brevity)
    return bleu


def _matches(sentences: Sequence[Sequence[int]], n: int) -> Matrix:
    """How many n-grams each two sentences share, one that comes twice in both counted twice."""
    columns: dict[tuple[int, ...], int] = {}
    places: list[tuple[int, int]] = []
    for row, sentence in enumerate(sentences):
        seen: Counter[tuple[int, ...]] = Counter()
        for begin in range(len(sentence) - n + 1):
            ngram = tuple(sentence[begin : begin + n])
            seen[ngram] += 1
            places.append((row, columns.setdefault((*ngram, seen[ngram]), len(columns))))
    has = np.zeros((len(sentences), len(columns)))
    if places:
        has[tuple(np.array(places).T)] = 1
    shared: Matrix = has @ has.T
    return shared
