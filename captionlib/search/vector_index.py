"""Unit vectors in Faiss: centroids learned once on a sample, one partial index a shard, merged, asked by inner product.

Every index is an inverted file; one of a single list compares with every vector, and is exact.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from captionlib.errors import DatasetError
from captionlib.search.index_config import VectorLayout

__all__ = ["Hits", "VectorIndex", "add_vectors", "merge_vectors", "train_vectors"]

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

_TRAINING_ROUNDS = 10


@dataclass(frozen=True)
class Hits:
    """What was found, the best first.

    Attributes:
        rows: `[found] int64`, numbers in the index.
        scores: `[found] float32`, the higher the better.
    """

    rows: Rows
    scores: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, some: slice) -> "Hits":
        return Hits(self.rows[some], self.scores[some])


def train_vectors(layout: VectorLayout, sample: Vectors, seed: int, path: Path) -> None:
    """Learns the centroids and the code, and writes an empty index.

    Args:
        layout: what it is to be like.
        sample: `[rows, size]` unit vectors.
        seed: of the clustering.
        path: of the file.
    """
    index = faiss.index_factory(layout.size, f"IVF{layout.lists},{layout.code}", faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed + 1
    index.cp.niter = _TRAINING_ROUNDS
    index.cp.min_points_per_centroid = 1  # few rows in many lists are somebody's choice, not worth a warning
    index.cp.spherical = True
    if isinstance(index, faiss.IndexIVFPQ):
        index.pq.cp.min_points_per_centroid = 1
    index.train(np.ascontiguousarray(sample, np.float32))
    faiss.write_index(index, str(path))


def add_vectors(trained: Path, rows: Rows, vectors: Vectors, path: Path) -> None:
    """Writes the partial index of one shard.

    Args:
        trained: what `train_vectors` wrote.
        rows: `[rows] int64`, the numbers of the vectors in the whole index.
        vectors: `[rows, size]`.
        path: of the file.
    """
    index = faiss.read_index(str(trained))
    if len(rows):
        index.add_with_ids(np.ascontiguousarray(vectors, np.float32), rows)
    faiss.write_index(index, str(path))


def merge_vectors(base: Path, parts: Iterable[Path], removed: Sequence[tuple[int, int]], path: Path) -> int:
    """Puts partial indexes into one; memory holds the codes of all.

    Args:
        base: the index that they are added to, an empty one at first.
        parts: of the shards, each of the same centroids.
        removed: ranges of rows to take out of the base, the end excluded.
        path: of the file.

    Returns:
        How many vectors there are.
    """
    index = faiss.read_index(str(base))
    for start, end in removed:
        index.remove_ids(faiss.IDSelectorRange(start, end))
    for part in parts:
        index.merge_from(faiss.read_index(str(part)), 0)
    faiss.write_index(index, str(path))
    return int(index.ntotal)


class VectorIndex:
    """The vectors of an index, opened to be asked. Safe to use from many threads, a thread a question.

    Args:
        path: of the file; the operating system pages in what questions touch.
        layout: what it is like.
        capacity: row numbers lie below this.

    Raises:
        DatasetError: the file is not what the layout says.
    """

    def __init__(self, path: Path, layout: VectorLayout, capacity: int) -> None:
        try:
            self._index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise DatasetError(f"{path} is no Faiss index ({error}); build the index again") from error
        if (self._index.d, self._index.nlist) != (layout.size, layout.lists):
            raise DatasetError(
                f"{path}: expected {layout.lists} lists of vectors of {layout.size} numbers, "
                f"got {self._index.nlist} of {self._index.d}; build the index again"
            )
        # Else 32 threads are started for each question, to read ahead: ten times what an answer from memory takes.
        faiss.downcast_InvertedLists(self._index.invlists).prefetch_nthread = 0
        self.layout = layout
        self._capacity = capacity

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, vector: Vectors, limit: int, passing: Rows | None = None, probes: int | None = None) -> Hits:
        """The nearest vectors.

        Looks into more lists the fewer rows pass, and into still more until there are `limit` or no more exist.

        Args:
            vector: `[size]`, of unit length.
            limit: how many.
            passing: the rows that may be found; None is all.
            probes: lists to look into where all rows pass; None is the index's own setting.
        """
        there = len(self) if passing is None else len(passing)
        limit = min(limit, there)
        if not limit:
            return Hits(np.empty(0, np.int64), np.empty(0, np.float32))
        layout = self.layout
        probes = min(layout.lists, probes or layout.probes)
        if passing is not None:
            probes = min(layout.lists, round(probes * self._capacity / there))
        selector, _bits = self._selector(passing)
        question = np.ascontiguousarray(vector, np.float32).reshape(1, -1)
        while True:
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=probes)
            scores, rows = self._index.search(question, limit, params=parameters)
            found = rows[0] >= 0
            if found.all() or probes == layout.lists:
                return Hits(rows[0][found], scores[0][found])
            probes = min(layout.lists, 4 * probes)

    def vector(self, row: int) -> Vectors | None:
        """The vector of a row as the index keeps it, `[size]`, of unit length; None where it has none."""
        lists = self._index.invlists
        for number in range(self.layout.lists):
            ids = faiss.rev_swig_ptr(lists.get_ids(number), lists.list_size(number))
            places = np.flatnonzero(ids == row)
            if len(places):
                vector: Vectors = np.empty(self.layout.size, np.float32)
                self._index.reconstruct_from_offset(number, int(places[0]), faiss.swig_ptr(vector))
                return vector / max(float(np.linalg.norm(vector)), 1e-12)
        return None

    def _selector(self, passing: Rows | None) -> tuple[Any, Any]:
        """What tells Faiss which rows pass, and the bits, which must live as long."""
        if passing is None:
            return None, None
        mask = np.zeros(self._capacity, np.bool_)
        mask[passing] = True
        bits = np.packbits(mask, bitorder="little")
        return faiss.IDSelectorBitmap(bits), bits
