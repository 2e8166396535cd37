"""Several rankings of the same rows as one."""

from collections.abc import Sequence

import numpy as np

from captionlib.search.vector_index import Hits

__all__ = ["fuse_rankings"]

_RANK_CONSTANT = 60  # Cormack, Clarke and Buettcher, Reciprocal Rank Fusion, SIGIR 2009


def fuse_rankings(rankings: Sequence[Hits]) -> Hits:
    """Reciprocal rank fusion: a row's score is the sum of 1 / (60 + rank) over the rankings that have it.

    Ranks count from 1. Rows of equal score stand by their numbers.
    """
    rows = np.concatenate([np.empty(0, np.int64), *(hits.rows for hits in rankings)])
    shares = np.concatenate([np.empty(0), *(1.0 / (_RANK_CONSTANT + 1 + np.arange(len(hits))) for hits in rankings)])
    unique, places = np.unique(rows, return_inverse=True)
    scores = np.bincount(places, weights=shares, minlength=len(unique))
    order = np.lexsort((unique, -scores))
    return Hits(unique[order], scores[order].astype(np.float32))
